// Package client speaks to the admin sockets of the CA and of the agent.
package client

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"sync/atomic"
	"syscall"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	meshcav1 "github.com/meshca/meshca/api/meshca/v1"
)

// The sockets' places.
const (
	DefaultCASocket    = "/run/meshca/admin.sock"
	DefaultAgentSocket = "/run/meshca-agent/admin.sock"
)

// maxMessage bounds an answer: the largest is an agent's status, with some KiB for each of several hundred workloads.
const maxMessage = 32 << 20

// Conn is a connection to an admin socket. CA and Agent are both there; which of them answers depends on the socket.
type Conn struct {
	CA    meshcav1.AdminServiceClient
	Agent meshcav1.AgentAdminServiceClient
	// Authorities is the CA's too.
	Authorities meshcav1.AuthorityServiceClient

	conn   *grpc.ClientConn
	first  net.Conn
	handed atomic.Bool // grpc has first
}

// Fault says why a socket could not be connected to.
type Fault int

// The faults that call for different next steps.
const (
	Unreachable Fault = iota // anything else: the error tells
	Absent                   // nothing is at the path
	Refused                  // a socket, and nobody listens
	Forbidden                // this user may not open it
	NotASocket               // a file or a directory is at the path
	NoAnswer                 // it took too long
)

// Error says which socket could not be connected to, and why.
type Error struct {
	Socket string
	Fault  Fault
	Err    error
}

func (e *Error) Error() string { return fmt.Sprintf("%s cannot be reached: %v", e.Socket, e.Err) }

// Unwrap returns the cause.
func (e *Error) Unwrap() error { return e.Err }

// Open connects to the socket. It returns an *Error when nobody can be reached there; the caller closes the Conn.
func Open(ctx context.Context, socket string) (*Conn, error) {
	first, err := dial(ctx, socket)
	if err != nil {
		return nil, &Error{Socket: socket, Fault: faultOf(socket, err), Err: cause(err)}
	}
	// grpc tells little of why it cannot connect, so the first connection is made here and handed to it.
	c := &Conn{first: first}
	c.conn, err = grpc.NewClient("passthrough:///meshca-admin",
		grpc.WithTransportCredentials(insecure.NewCredentials()), // a unix socket of mode 0600: the kernel keeps others out
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) {
			if c.handed.CompareAndSwap(false, true) {
				return first, nil
			}
			return dial(ctx, socket)
		}),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(maxMessage)),
	)
	if err != nil {
		_ = first.Close()
		return nil, &Error{Socket: socket, Err: err}
	}
	c.CA, c.Agent = meshcav1.NewAdminServiceClient(c.conn), meshcav1.NewAgentAdminServiceClient(c.conn)
	c.Authorities = meshcav1.NewAuthorityServiceClient(c.conn)
	return c, nil
}

// Close ends the connection.
func (c *Conn) Close() error {
	if c.handed.CompareAndSwap(false, true) { // no call was made: grpc never saw it
		_ = c.first.Close()
	}
	return c.conn.Close()
}

func dial(ctx context.Context, socket string) (net.Conn, error) {
	d := net.Dialer{Timeout: 5 * time.Second}
	return d.DialContext(ctx, "unix", socket)
}

func faultOf(socket string, err error) Fault {
	var timeout net.Error
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return Absent
	case errors.Is(err, fs.ErrPermission):
		return Forbidden
	case errors.Is(err, syscall.ECONNREFUSED):
		// Linux says so of a plain file too.
		if info, err := os.Lstat(socket); err == nil && (info.Mode().IsRegular() || info.IsDir()) {
			return NotASocket
		}
		return Refused
	case errors.As(err, &timeout) && timeout.Timeout():
		return NoAnswer
	}
	return Unreachable
}

// cause leaves out what net.OpError repeats: the verb, the network and the path.
func cause(err error) error {
	var op *net.OpError
	if errors.As(err, &op) {
		return op.Err
	}
	return err
}
