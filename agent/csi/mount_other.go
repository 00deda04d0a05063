//go:build !linux

package csi

import "errors"

var errNotLinux = errors.New("this system is not Linux: it has no kubelet with CSI drivers")

func bind(_, _, _ string) error { return errNotLinux }

func unmount(string) error { return errNotLinux }

func mounts() ([]mountPoint, error) { return nil, errNotLinux }
