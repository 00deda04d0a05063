//go:build !linux

package csi

import "net"

// peerUID fails: who calls cannot be told.
func peerUID(net.Conn) (int, error) { return -1, errNotLinux }
