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
	if v.state != nil && v.state.Target != r.GetTargetPath() && v.at(v.state.Target) {
		// Another pod uses it: what was refused to this one leaves nothing but a directory.
		if err := d.unmountTarget(r.GetTargetPath()); err != nil {
			return nil, refusal.New(refusal.MountFailed, "%w", err)
		}
		return &csi.NodeUnpublishVolumeResponse{}, nil
	}
	if v.state != nil {
		d.log.Info("a pod's volume ends", "volume", v.key(), "pod", v.state.Pod.String())
	}
	if err := d.unmountTarget(r.GetTargetPath()); err != nil {
		return nil, refusal.New(refusal.MountFailed, "%w", err)
	}
	if err := d.end(v); err != nil {
		return nil, err
	}
	return &csi.NodeUnpublishVolumeResponse{}, nil
}

// unmountTarget takes away what is mounted at a target, and the target itself, as the CSI spec wants.
func (d *Driver) unmountTarget(target string) error {
	if err := unmount(target); err != nil {
		return err
	}
	if err := os.Remove(target); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}
