package csi

import (
	"errors"
	"os"

	"github.com/container-storage-interface/spec/lib/go/csi"

	"github.com/meshca/meshca/api/refusal"
)

// republish refreshes a volume that a pod uses. What goes wrong is for logs and checks.
func (d *Driver) republish(v *volume, a *ask, r *csi.NodePublishVolumeRequest, wrong error) {
	target := r.GetTargetPath()
	errs := []error{wrong}
	changed := false
	if v.state != nil && !v.state.fits(a, target) { // it was begun for something else, and no pod has it
		if err := d.end(v); err != nil {
			d.note(v, err)
			return
		}
	}
	if v.state == nil && a != nil {
		errs = append(errs, d.takeOver(v, a))
	}
	if v.state == nil {
		d.note(v, errors.Join(errs...))
		return
	}
	if !v.at(v.state.Target) {
		errs = append(errs, d.remount(v))
	}
	errs = append(errs, v.settle(d.boot))
	if v.state.Replaced {
		errs = append(errs, refusal.New(refusal.VolumeReplaced, "containers of pod %s that ran before have another directory than the one that is served", v.state.Pod))
	}
	var token secret
	if a != nil {
		token = a.token
	} else { // the rest was not understood, as by an agent of an earlier version; the identity would end without its token
		var err error
		token, err = tokenOf(r, v.state.Pod)
		errs = append(errs, err)
	}
	if token.reveal() != "" {
		var err error
		changed, err = v.saveToken(token)
		errs = append(errs, err)
	}
	k, anew, err := d.keep(v)
	if err == nil && changed && !anew {
		k.TokenChanged()
	}
	d.note(v, errors.Join(append(errs, err)...))
}

// takeOver makes what a pod uses and nothing is known of: an agent with another directory made it, or what an earlier run
// wrote down is damaged.
func (d *Driver) takeOver(v *volume, a *ask) error {
	if !v.at(a.target) { // whatever lies here is not what this pod has, least of all a token
		if err := v.remove(); err != nil {
			return err
		}
	}
	return errors.Join(v.prepare(a.state(), d.label), d.claim(v, a.pod))
}

// remount mounts the volume's directory where the pod has something else, or nothing any more. Containers that run keep
// what they have: where that is another directory, it is served no longer.
func (d *Driver) remount(v *volume) error {
	_, lost := os.Lstat(v.inside())
	if lost != nil || d.occupied(v.state.Target) {
		v.state.Replaced = true
	}
	d.log.Warn("a pod's volume was unmounted by somebody, or made by an agent with another directory; it is mounted anew, for containers that start from now on",
		"volume", v.key(), "pod", v.state.Pod.String())
	if err := v.prepare(v.state, d.label); err != nil {
		return err
	}
	return d.mount(v)
}
