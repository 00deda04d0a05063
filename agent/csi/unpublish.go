package csi

import (
	"context"
	"errors"
	"io/fs"
	"os"

	"github.com/container-storage-interface/spec/lib/go/csi"

	"github.com/meshca/meshca/api/refusal"
)

// NodeUnpublishVolume ends everything: the streams and the socket, the key, the token, the mount. It succeeds where
// nothing is there.
func (d *Driver) NodeUnpublishVolume(ctx context.Context, r *csi.NodeUnpublishVolumeRequest) (*csi.NodeUnpublishVolumeResponse, error) {
	if err := errors.Join(checkID(r.GetVolumeId()), checkPath(r.GetTargetPath())); err != nil {
		return nil, err
	}
	v, release, err := d.take(ctx, keyOf(r.GetVolumeId()))
	if err != nil {
		return nil, err
	}
	defer release()
	if err := v.checkTarget(r.GetTargetPath(), d.config.KubeletDir); err != nil {
		return nil, err
	}
	if err := d.unpublish(v, r.GetTargetPath()); err != nil {
		d.log.Error("of a pod's volume that ends not all can be taken away; the kubelet tries again", "volume", v.key(), "error", err)
		return nil, err
	}
	return &csi.NodeUnpublishVolumeResponse{}, nil
}

// unpublish ends the volume whatever becomes of the target: with an error, too, nobody has the pod's identity any more.
func (d *Driver) unpublish(v *volume, target string) error {
	var err error
	elsewhere := v.state != nil && v.state.Target != target
	if v.state == nil || elsewhere {
		if err = unmount(target); err != nil {
			err = refusal.New(refusal.MountFailed, "%w", err)
		} else {
			err = removeTarget(target)
		}
	}
	if elsewhere && v.at(v.state.Target) {
		return err // another pod uses it: what was refused to this one leaves nothing but a directory
	}
	if v.state != nil {
		d.log.Info("a pod's volume ends", "volume", v.key(), "pod", v.state.Pod.String())
	}
	return errors.Join(err, d.end(v))
}

// removeTarget takes a target away, as the CSI spec wants, where nothing is mounted any more. What somebody put there when
// the volume was not mounted stays: a container could not have written it.
func removeTarget(target string) error {
	err := os.Remove(target)
	switch {
	case errors.Is(err, fs.ErrExist): // ENOTEMPTY
		return refusal.New(refusal.MountFailed, "the volume is gone, but %s holds something that is not this driver's: empty it, and the pod can end", target)
	case err != nil && !errors.Is(err, fs.ErrNotExist):
		return refusal.New(refusal.MountFailed, "%w", err)
	}
	return nil
}
