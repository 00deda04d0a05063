package main

import (
	"errors"
	"net"
	"net/http"
	"os"
	"testing"
	"time"
)

// A stranger who opens connections and says nothing has a few of them, and not for long.
func TestConnectionsToTheOpsAddressAreBounded(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() { ended <- serveOps(t.Context(), l, http.NotFoundHandler()) }()
	t.Cleanup(func() {
		if err := <-ended; err != nil {
			t.Error(err)
		}
	})
	var last net.Conn
	for range 64 {
		conn, err := net.Dial("tcp", l.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		last = conn
	}
	if err := last.SetReadDeadline(time.Now().Add(3 * time.Second)); err != nil {
		t.Fatal(err)
	}
	if _, err := last.Read(make([]byte, 1)); err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("the last of 64 from one address stays: %v", err)
	}
}
