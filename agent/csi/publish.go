package csi

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"runtime/debug"
	"strings"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"

	"github.com/meshca/meshca/agent"
	"github.com/meshca/meshca/api/refusal"
)

const (
	// margin is what is left of the kubelet's time for our answer to arrive in.
	margin = 5 * time.Second
	// opening bounds the wait for the socket of a volume that waits for nothing else.
	opening = 10 * time.Second
)

// NodePublishVolume makes a pod's volume, and later refreshes it: a kubelet repeats the call about every minute, with
// fresh tokens, for as long as the pod lives. The first one waits for the first SVID. Later ones never fail: kubelets
// before mid-2026 take a running pod's volume apart when they do.
func (d *Driver) NodePublishVolume(ctx context.Context, r *csi.NodePublishVolumeRequest) (*csi.NodePublishVolumeResponse, error) {
	if err := errors.Join(checkID(r.GetVolumeId()), checkPath(r.GetTargetPath())); err != nil {
		return nil, err
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	defer context.AfterFunc(d.running, cancel)()
	v, release, err := d.take(ctx, keyOf(r.GetVolumeId()))
	if err != nil {
		return nil, err
	}
	defer release()
	v.asked = time.Now()
	var a *ask
	wrong := d.surviving(func() (err error) { a, err = parse(r, d.config.Writer); return err })
	if err := v.free(a, r.GetTargetPath()); err != nil {
		return nil, err
	}
	if v.used(a, r.GetTargetPath()) || d.occupied(r.GetTargetPath()) {
		if err := d.surviving(func() error { d.republish(v, a, r, wrong); return nil }); err != nil {
			d.note(v, err)
		}
		return &csi.NodePublishVolumeResponse{}, nil
	}
	if err := errors.Join(wrong, v.checkTarget(r.GetTargetPath(), d.config.KubeletDir)); err != nil {
		return nil, err
	}
	if err := a.wish.check(); err != nil {
		return nil, err
	}
	if err := d.publish(ctx, v, a); err != nil {
		d.log.Warn("a pod's volume is not mounted", "volume", v.key(), "pod", a.pod.String(), "error", err)
		return nil, err
	}
	return &csi.NodePublishVolumeResponse{}, nil
}

// surviving makes an error of a panic, also of one in what a republish does.
func (d *Driver) surviving(f func() error) (err error) {
	defer func() {
		if p := recover(); p != nil {
			d.log.Error("a fault of the agent's own with a pod's volume; the agent goes on", "panic", refusal.Panicked(p), "stack", string(debug.Stack()))
			err = refusal.New(refusal.Internal, "an internal fault: the agent's log has it")
		}
	}()
	return f()
}

// used reports whether the pod uses the volume at target: it is mounted there, or was in this boot, for this pod, and
// somebody unmounted it.
func (v *volume) used(a *ask, target string) bool {
	return v.state != nil && v.mounted && v.state.fits(a, target) || v.at(target)
}

// occupied reports whether anything is mounted at a target below the kubelet's directory. Nobody but this driver mounts
// there, so the pod uses its volume: an agent with another runtime directory made it, or the directory was wiped.
func (d *Driver) occupied(target string) bool {
	if !strings.HasPrefix(target, d.config.KubeletDir+"/") {
		return false
	}
	all, err := mounts()
	if err != nil {
		d.log.Error("the mounts of this node cannot be read; a volume that a pod uses may be taken for a new one", "error", err)
	}
	return mountPointAt(all, target)
}

// free refuses a volume that another pod uses, or that is used elsewhere: who asks now must not get its identity, nor
// put another token in its place.
func (v *volume) free(a *ask, target string) error {
	if v.state == nil || !v.at(v.state.Target) {
		return nil
	}
	if !v.state.fits(a, target) {
		return refusal.New(refusal.VolumeTaken, "the volume is mounted for pod %s (UID %s)", v.state.Pod, v.state.Pod.UID)
	}
	return nil
}

// publish makes the volume. What failed for good leaves nothing: the kubelet does not come back for it.
func (d *Driver) publish(ctx context.Context, v *volume, a *ask) error {
	// 1. What was begun for something else makes room. What a call before began for this goes on.
	if v.state != nil && !v.state.equal(a.state()) {
		if err := d.end(v); err != nil {
			return err
		}
	}
	if err := d.claim(v, a.pod); err != nil {
		return err
	}
	// 2. What the workload is made of is on disk before anybody uses it.
	k, err := d.begin(v, a)
	if err != nil {
		return d.undone(v, refusal.New(refusal.MountFailed, "%w", err))
	}
	// 3. The identity comes first, so that the pod's containers never see a volume without one.
	if err := d.await(ctx, v, k); err != nil {
		if refusal.Of(err).Passing() {
			return err // it goes on; the kubelet asks again
		}
		return d.undone(v, err)
	}
	// 4. The mount makes it a volume that a pod uses, for this run of the agent and the next.
	if err := d.mount(v); err != nil {
		return d.undone(v, err)
	}
	if err := v.settle(d.boot); err != nil { // the mount says it, too
		d.log.Warn("a mount cannot be written down; if it is lost while the agent is away, the pod has to wait again", "volume", v.key(), "error", err)
	}
	d.log.Info("a pod's volume is mounted", "volume", v.key(), "pod", a.pod.String(), "service_account", a.pod.ServiceAccount)
	return nil
}

func (d *Driver) begin(v *volume, a *ask) (*agent.Kept, error) {
	if err := v.prepare(a.state(), d.label); err != nil {
		return nil, err
	}
	changed, err := v.saveToken(a.token)
	if err != nil {
		return nil, err
	}
	k, anew, err := d.keep(v)
	if err != nil {
		return nil, err
	}
	if changed && !anew {
		k.TokenChanged()
	}
	return k, nil
}

// undone takes away what was made, and returns why.
func (d *Driver) undone(v *volume, why error) error {
	if err := d.end(v); err != nil {
		d.log.Error("what was made for a volume cannot be taken away; it is tried again", "volume", v.key(), "error", err)
	}
	return why
}

// await waits for what a pod must have at its start. Where it does not come, the error is one sentence for the pod's
// events: a passing one when time ran out, and at once the CA's final one.
func (d *Driver) await(ctx context.Context, v *volume, k *agent.Kept) error {
	patience := d.config.Timeout
	if end, ok := ctx.Deadline(); ok {
		patience = min(patience, time.Until(end)-margin)
	}
	if v.state.Wish.Optional {
		patience = min(patience, opening)
	}
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	if v.state.Wish.Optional {
		if err := k.Listening(ctx); err != nil {
			d.log.Warn("an optional volume is mounted before its socket is open", "pod", v.state.Pod.String(), "error", err)
		}
		return nil
	}
	err := k.Ready(ctx)
	if err == nil {
		err = v.files.wait(ctx)
	}
	if err == nil {
		return nil
	}
	why := err.Error()
	e, ok := refusal.From(err)
	if ok {
		why = e.Error()
	}
	who := fmt.Sprintf("pod %s (service account %s)", v.state.Pod, v.state.Pod.ServiceAccount)
	switch {
	case d.running.Err() != nil:
		return refusal.New(refusal.Stopping, "%s has to wait: the node's meshca-agent is stopping", who)
	case ctx.Err() != nil:
		return refusal.New(refusal.SVIDPending, "%s has no SVID yet, after %v: %s", who, patience.Round(time.Second), why)
	case ok:
		return refusal.New(e.Reason, "%s gets no SVID: %s", who, why)
	}
	return refusal.New(refusal.Internal, "%s gets no SVID: %s", who, why)
}

// mount puts the volume's directory at the kubelet's target, in the place of what was mounted there.
func (d *Driver) mount(v *volume) error {
	target := v.state.Target
	failed := func(err error) error { return refusal.New(refusal.MountFailed, "%w", err) }
	if err := unmount(target); err != nil {
		return failed(err)
	}
	if err := os.Mkdir(target, 0o750); err != nil && !errors.Is(err, fs.ErrExist) {
		return failed(err)
	}
	if info, err := os.Lstat(target); err != nil || !info.IsDir() { // a mount would follow a symbolic link
		return failed(fmt.Errorf("%s is no directory", target))
	}
	if err := bind(v.inside(), v.staged(), target); err != nil {
		return failed(err)
	}
	return nil
}
