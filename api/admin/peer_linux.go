package admin

import (
	"fmt"
	"net"
	"syscall"
)

// peerOf reads SO_PEERCRED (unix(7)).
func peerOf(conn net.Conn) (Peer, error) {
	socket, ok := conn.(syscall.Conn)
	if !ok {
		return Peer{}, fmt.Errorf("%T is no socket", conn)
	}
	raw, err := socket.SyscallConn()
	if err != nil {
		return Peer{}, err
	}
	var cred *syscall.Ucred
	var failed error
	err = raw.Control(func(fd uintptr) {
		cred, failed = syscall.GetsockoptUcred(int(fd), syscall.SOL_SOCKET, syscall.SO_PEERCRED)
	})
	if err != nil {
		return Peer{}, err
	}
	if failed != nil {
		return Peer{}, fmt.Errorf("SO_PEERCRED: %w", failed)
	}
	return Peer{UID: cred.Uid, GID: cred.Gid, PID: cred.Pid}, nil
}
