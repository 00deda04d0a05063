package main

import (
	"bufio"
	"context"
	"errors"
	"io"
	"net/http"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc/test/bufconn"
)

// A connection that asks for nothing more gives its place back soon: an address has few.
func TestIdleConnectionsToTheOpsAddressEnd(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithCancel(context.Background())
		l, ended := bufconn.Listen(1<<16), make(chan error, 1)
		go func() { ended <- serveOps(ctx, l, http.NotFoundHandler()) }()
		conn, err := l.Dial()
		if err != nil {
			t.Fatal(err)
		}
		_, err = io.WriteString(conn, "GET /livez HTTP/1.1\r\nHost: meshca\r\n\r\n")
		if err != nil {
			t.Fatal(err)
		}
		r := bufio.NewReader(conn)
		answer, err := http.ReadResponse(r, nil)
		if err != nil {
			t.Fatal(err)
		}
		_, err = io.Copy(io.Discard, answer.Body)
		err = errors.Join(err, answer.Body.Close())
		if err != nil {
			t.Fatal(err)
		}
		began := time.Now()
		if _, err := r.ReadByte(); err == nil || time.Since(began) > 5*time.Second {
			t.Errorf("after %v: %v", time.Since(began), err)
		}
		cancel()
		if err := <-ended; err != nil {
			t.Error(err)
		}
	})
}
