package csi

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"golang.org/x/sync/errgroup"

	"github.com/meshca/meshca/agent"
	"github.com/meshca/meshca/agent/selinux"
	"github.com/meshca/meshca/api/refusal"
)

// maxPerPod bounds the volumes of one pod.
const maxPerPod = 16

// Driver is the CSI node driver of one agent.
type Driver struct {
	csi.UnimplementedIdentityServer
	csi.UnimplementedNodeServer

	config       Config
	log          *slog.Logger
	registration registration
	label        func(path string) error // gives a directory the label that SELinux has for containers
	boot         string                  // names the boot that the machine is in; empty: nothing does
	// What Run sets before anybody calls:
	agent   *agent.Agent
	running context.Context //nolint:containedctx // that of Run: what the kubelet waits for ends with it

	mu      sync.Mutex
	volumes map[string]*volume // by key; those that stand, and those that somebody works on
	// blind is why mounts may not reach the kubelet, as far as mountinfo tells; set by Known.
	blind error
}

var (
	_ agent.Source       = (*Driver)(nil)
	_ agent.Reporter     = (*Driver)(nil)
	_ csi.NodeServer     = (*Driver)(nil)
	_ csi.IdentityServer = (*Driver)(nil)
)

// New makes a driver, to be handed to one agent. It touches nothing before Known.
func New(c Config) (*Driver, error) {
	if err := c.Check(); err != nil {
		return nil, err
	}
	c = c.withDefaults()
	if c.Version == "" {
		return nil, errors.New("csi: the version is missing")
	}
	return &Driver{config: c, log: c.Log, label: selinux.Label, boot: agent.BootID(), volumes: make(map[string]*volume)}, nil
}

// Run serves the kubelet until ctx ends. A socket that cannot be opened is tried again, and until then the agent is not
// ready; it never returns an error.
func (d *Driver) Run(ctx context.Context, a *agent.Agent) error {
	d.agent, d.running = a, ctx
	for _, v := range d.all() {
		if k := a.Find(v.socket()); k != nil {
			d.file(v, k)
		} // else it was not taken up, and the next republish tries again
	}
	var g errgroup.Group
	opened := make(chan struct{})
	g.Go(func() error { d.serveKubelet(ctx, opened); return nil })
	g.Go(func() error {
		select {
		case <-opened: // the kubelet calls there as soon as it knows of it
			d.serveRegistration(ctx)
		case <-ctx.Done():
		}
		return nil
	})
	g.Go(func() error { d.sweepUntilDone(ctx); return nil })
	err := g.Wait()
	for _, v := range d.all() {
		v.files.stop()
	}
	// Directories that hold nothing any more; where there are volumes, or others have files in them, they stay.
	for _, dir := range []string{d.config.Dir, filepath.Dir(d.config.Socket)} {
		_ = os.Remove(dir)
	}
	return err
}

// all are the volumes of now.
func (d *Driver) all() (list []*volume) {
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, v := range d.volumes {
		list = append(list, v)
	}
	return list
}

// take waits for the turn to work on a volume. Calls for different volumes do not wait for each other.
func (d *Driver) take(ctx context.Context, key string) (v *volume, release func(), err error) {
	if v, release, ok := d.takeIdle(key); ok { // also where ctx has ended: a republish never fails
		return v, release, nil
	}
	v = d.use(key)
	select {
	case v.turn <- struct{}{}:
		return v, func() { <-v.turn; d.leave(v) }, nil
	case <-ctx.Done():
		d.leave(v)
		return nil, nil, refusal.New(refusal.CallEnded, "another call for the same volume is still in hand")
	}
}

// takeIdle takes the turn if nobody has it.
func (d *Driver) takeIdle(key string) (v *volume, release func(), ok bool) {
	v = d.use(key)
	select {
	case v.turn <- struct{}{}:
		return v, func() { <-v.turn; d.leave(v) }, true
	default:
		d.leave(v)
		return nil, nil, false
	}
}

func (d *Driver) use(key string) *volume {
	d.mu.Lock()
	defer d.mu.Unlock()
	v := d.volumes[key]
	if v == nil {
		v = newVolume(d.config.Dir, key)
		d.volumes[key] = v
	}
	v.uses++
	return v
}

func (d *Driver) leave(v *volume) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if v.uses--; v.uses == 0 && v.state == nil {
		delete(d.volumes, v.key())
	}
}

// keep has the agent keep the volume's workload. anew: it did not before.
func (d *Driver) keep(v *volume) (k *agent.Kept, anew bool, err error) {
	if k = d.agent.Find(v.socket()); k == nil {
		if k, err = d.agent.Add(v.workload()); err != nil {
			return nil, false, err
		}
		anew = true
	}
	d.file(v, k)
	return k, anew, nil
}

// claim counts a volume for its pod, if that has not as many as it may: each has its own SVID, socket and files.
func (d *Driver) claim(v *volume, p pod) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	others := 0
	for _, x := range d.volumes {
		if x != v && x.podUID == p.UID {
			others++
		}
	}
	if others >= maxPerPod {
		return invalid("pod %s has %d volumes of %s, as many as it may: one is enough for all of its containers", p, others, d.config.Name)
	}
	v.podUID = p.UID
	return nil
}

// end takes away all that there is of a volume. What it cannot take away stays known, for the next try.
func (d *Driver) end(v *volume) error {
	v.files.stop()
	v.files = nil
	var errs []error
	if k := d.agent.Find(v.socket()); k != nil {
		errs = append(errs, k.Remove())
	}
	target := ""
	if v.state != nil {
		target = v.state.Target
		errs = append(errs, unmount(target))
	}
	if err := errors.Join(errs...); err != nil {
		return refusal.New(refusal.MountFailed, "%w", err)
	}
	if err := v.remove(); err != nil {
		return refusal.New(refusal.MountFailed, "%w", err)
	}
	v.state, v.mounted = nil, false
	d.mu.Lock()
	v.podUID = ""
	d.mu.Unlock()
	d.note(v, nil)
	if target == "" {
		return nil
	}
	return removeTarget(target)
}

// note remembers what is wrong with a volume that a pod uses, for checks, and tells it once.
func (d *Driver) note(v *volume, fault error) {
	d.mu.Lock()
	before := v.fault
	v.fault = fault
	d.mu.Unlock()
	if fault == nil || before != nil && before.Error() == fault.Error() {
		return
	}
	whose := "unknown"
	if v.state != nil {
		whose = v.state.Pod.String()
	}
	d.log.Error("a volume that a pod uses is not as it should be; the kubelet's next call tries what can be tried again", "volume", v.key(), "pod", whose, "error", fault)
}

// Standing is how the driver is: registered or not, and what is wrong with volumes.
func (d *Driver) Standing() agent.Standing {
	s := agent.Standing{Subject: "CSI driver", NotReady: d.registration.standing(d.config)}
	d.mu.Lock()
	defer d.mu.Unlock()
	standing := 0
	for _, v := range d.volumes {
		if v.fault != nil {
			s.Faults = append(s.Faults, v.fault)
		}
		standing++
	}
	slices.SortFunc(s.Faults, func(a, b error) int { return strings.Compare(a.Error(), b.Error()) })
	if d.blind != nil {
		s.Faults = append(s.Faults, d.blind)
	}
	s.Well = fmt.Sprintf("%s is registered with the kubelet, %d volumes", d.config.Name, standing)
	return s
}
