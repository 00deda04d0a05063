package inbound

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

// A connection that asks for nothing more gives its place back at once.
func TestIdleConnectionsToTheOpsAddressEnd(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		must := func(err error) {
			t.Helper()
			if err != nil {
				t.Fatal(err)
			}
		}
		ctx, cancel := context.WithCancel(t.Context())
		l, ended := bufconn.Listen(1<<16), make(chan error, 1)
		go func() { ended <- ServeOps(ctx, l, http.NotFoundHandler()) }()
		conn, err := l.Dial()
		must(err)
		_, err = io.WriteString(conn, "GET /livez HTTP/1.1\r\nHost: meshca\r\n\r\n")
		must(err)
		r := bufio.NewReader(conn)
		answer, err := http.ReadResponse(r, nil)
		must(err)
		_, err = io.Copy(io.Discard, answer.Body)
		must(errors.Join(err, answer.Body.Close()))
		began := time.Now()
		if _, err := r.ReadByte(); err == nil || time.Since(began) > 5*time.Second {
			t.Errorf("after %v: %v", time.Since(began), err)
		}
		cancel()
		must(<-ended)
	})
}

// What is being asked when the server is told to end has its answer, and is waited for.
func TestTheOpsAddressAnswersAtTheEnd(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		answered := false
		handler := http.HandlerFunc(func(http.ResponseWriter, *http.Request) {
			cancel()
			time.Sleep(opsDrain / 2)
			answered = true
		})
		l, ended := bufconn.Listen(1<<16), make(chan error, 1)
		go func() { ended <- ServeOps(ctx, l, handler) }()
		conn, err := l.Dial()
		if err != nil {
			t.Fatal(err)
		}
		go func() {
			_, _ = io.WriteString(conn, "GET /metrics HTTP/1.1\r\nHost: meshca\r\n\r\n")
			_, _ = io.Copy(io.Discard, conn)
		}()
		if err := <-ended; err != nil || !answered {
			t.Errorf("ended with %v; answered: %v", err, answered)
		}
	})
}
