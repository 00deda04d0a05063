package csi

import (
	"fmt"
	"net"
	"syscall"
)

// peerUID reads SO_PEERCRED (unix(7)).
func peerUID(conn net.Conn) (int, error) {
	socket, ok := conn.(syscall.Conn)
	if !ok {
		return -1, fmt.Errorf("%T is no socket", conn)
	}
	raw, err := socket.SyscallConn()
	if err != nil {
		return -1, err
	}
	var cred *syscall.Ucred
	var failed error
	err = raw.Control(func(fd uintptr) {
		cred, failed = syscall.GetsockoptUcred(int(fd), syscall.SOL_SOCKET, syscall.SO_PEERCRED)
	})
	if err != nil {
		return -1, err
	}
	if failed != nil {
		return -1, fmt.Errorf("SO_PEERCRED: %w", failed)
	}
	return int(cred.Uid), nil
}
