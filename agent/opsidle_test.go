package agent

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
	n := newNode(t)
	a, err := New(n.config)
	must(t, err)
	defer a.client.Close()
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithCancel(context.Background())
		l, ended := bufconn.Listen(1<<16), make(chan error, 1)
		go func() { ended <- a.serveOps(ctx, l) }()
		conn, err := l.Dial()
		must(t, err)
		_, err = io.WriteString(conn, "GET /livez HTTP/1.1\r\nHost: agent\r\n\r\n")
		must(t, err)
		r := bufio.NewReader(conn)
		answer, err := http.ReadResponse(r, nil)
		must(t, err)
		_, err = io.Copy(io.Discard, answer.Body)
		err = errors.Join(err, answer.Body.Close())
		must(t, err)
		began := time.Now()
		if _, err := r.ReadByte(); err == nil || time.Since(began) > 5*time.Second {
			t.Errorf("after %v: %v", time.Since(began), err)
		}
		cancel()
		must(t, <-ended)
	})
}
