package csi

import (
	"context"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"github.com/meshca/meshca/agent"
	"github.com/meshca/meshca/api/refusal"
)

const (
	// sweepEvery is how often it is looked for volumes that nobody asks for any more.
	sweepEvery = time.Minute
	// abandoned is how long ago the kubelet asked last for a volume that it has given up: it comes back for those that
	// it wants at least every two minutes, and each call takes as long at most.
	abandoned = 10 * time.Minute
)

// Known are the volumes that pods use: they are mounted where the kubelet wanted them, or were in this boot and somebody
// took the mount away, which the kubelet's next call mends. What else is left of an earlier run goes: what was never
// mounted, and what a reboot unmounted, the kubelet asks for anew. Mounts themselves are left where they are, also those of
// directories that are gone: they tell that a pod uses its volume, until the kubelet ends it.
func (d *Driver) Known() ([]agent.Workload, error) {
	if err := private(d.config.Dir); err != nil {
		return nil, fmt.Errorf("the directory for volumes: %w", err)
	}
	entries, err := os.ReadDir(d.config.Dir)
	if err != nil {
		return nil, err
	}
	mounted, looked := d.look()
	var known []agent.Workload
	for _, e := range entries {
		v := newVolume(d.config.Dir, e.Name())
		s, err := v.load()
		switch {
		case err == nil && (v.at(s.Target) || s.Boot != "" && s.Boot == d.boot):
			v.state, v.mounted, v.asked, v.podUID = s, true, time.Now(), s.Pod.UID
			d.volumes[v.key()] = v
			known = append(known, v.workload())
		case err != nil && (len(mounted[v.key()]) > 0 || !looked):
			// The pod can have it back: the kubelet's next call tells all that was lost.
			d.log.Error("the state of a volume that a pod uses is lost; it is served again when the kubelet calls", "volume", v.key(), "error", err)
		default:
			if err := v.remove(); err != nil {
				d.log.Error("what is left of a volume cannot be removed", "volume", v.key(), "error", err)
			}
		}
	}
	return known, nil
}

// look finds where the driver's directories are mounted, by key, and whether new mounts reach the kubelet. ok: it could see that.
func (d *Driver) look() (found map[string][]string, ok bool) {
	all, err := mounts()
	if err != nil {
		d.log.Error("the mounts of this node cannot be read; what is left of an earlier run may stay", "error", err)
		return nil, false
	}
	kubeletDir := resolved(d.config.KubeletDir)
	found = make(map[string][]string)
	for _, b := range boundOf(all, resolved(d.config.Dir), kubeletDir) {
		found[b.key] = append(found[b.key], b.at)
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	d.blind = nil
	if m, ok := over(all, kubeletDir); ok && m.at != "/" && !m.shared {
		d.blind = refusal.New(refusal.MountFailed,
			"the mount at %s is not shared: where the kubelet runs in another mount namespace, pods would find empty volumes", m.at)
	}
	return found, true
}

// resolved is a path as mountinfo has it.
func resolved(path string) string {
	if p, err := filepath.EvalSymlinks(path); err == nil {
		return p
	}
	return path
}

// sweepUntilDone looks again and again for volumes that nobody asks for any more.
func (d *Driver) sweepUntilDone(ctx context.Context) {
	look := time.NewTicker(sweepEvery)
	defer look.Stop()
	for {
		select {
		case <-look.C:
			d.sweep(time.Now())
		case <-ctx.Done():
			return
		}
	}
}

// sweep ends volumes that are not mounted (any more), and that the kubelet has not asked for in a long time: what it began
// and gave up, and what went while it was away. A volume that is mounted is left to the kubelet, which may be down for
// as long as it likes: also one of which nothing is known. Its next call tells whose it is, or ends it.
func (d *Driver) sweep(now time.Time) {
	entries, err := os.ReadDir(d.config.Dir)
	if err != nil {
		d.log.Error("the directory for volumes cannot be read", "error", err)
		return
	}
	mounted, looked := d.look()
	if !looked {
		return
	}
	for _, e := range entries {
		v, release, ok := d.takeIdle(e.Name())
		if !ok {
			continue
		}
		used := len(mounted[v.key()]) > 0 || v.state != nil && v.at(v.state.Target)
		if last, ok := v.lastUse(); ok && now.Sub(last) > abandoned && !used {
			d.log.Warn("a volume that nobody asks for any more is taken away", "volume", v.key())
			if err := d.end(v); err != nil {
				d.log.Error("a volume that nobody asks for any more cannot be taken away", "volume", v.key(), "error", err)
			}
		}
		release()
	}
}

// lastUse is when the kubelet asked last; of what no call of this run is known, when it was made.
func (v *volume) lastUse() (time.Time, bool) {
	if !v.asked.IsZero() {
		return v.asked, true
	}
	info, err := os.Lstat(v.dir)
	if err != nil {
		return time.Time{}, false
	}
	return info.ModTime(), true
}

// private makes a directory that only the agent can enter.
func private(dir string) error {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	info, err := os.Lstat(dir)
	switch {
	case err != nil:
		return err
	case !info.IsDir():
		return fmt.Errorf("%s is no directory", dir)
	case info.Mode().Perm()&^fs.FileMode(0o700) != 0:
		return os.Chmod(dir, 0o700)
	}
	return nil
}
