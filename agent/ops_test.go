package agent

import (
	"errors"
	"net"
	"os"
	"testing"
	"time"
)

// A stranger who opens connections and says nothing has a few of them, and not for long.
func TestConnectionsToTheOpsAddressAreBounded(t *testing.T) {
	n := newNode(t)
	a, err := New(n.config)
	must(t, err)
	defer a.client.Close()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	must(t, err)
	ended := make(chan error, 1)
	go func() { ended <- a.serveOps(t.Context(), l) }()
	t.Cleanup(func() { must(t, <-ended) })
	var last net.Conn
	for range 64 {
		conn, err := net.Dial("tcp", l.Addr().String())
		must(t, err)
		defer conn.Close()
		last = conn
	}
	must(t, last.SetReadDeadline(time.Now().Add(3*time.Second)))
	if _, err := last.Read(make([]byte, 1)); err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("the last of 64 from one address stays: %v", err)
	}
}
