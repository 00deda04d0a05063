package agent

import (
	"bufio"
	"io"
	"net"
	"net/http"
	"testing"
)

// serveOps serves an agent's ops address at a listener.
func serveOps(t *testing.T, l net.Listener) {
	t.Helper()
	a, err := New(newNode(t).config)
	must(t, err)
	t.Cleanup(func() { _ = a.client.Close() })
	ended := make(chan error, 1)
	go func() { ended <- a.serveOps(t.Context(), l) }()
	t.Cleanup(func() { must(t, <-ended) })
}

// request sends a request.
func request(t *testing.T, conn net.Conn, path string) {
	t.Helper()
	_, err := io.WriteString(conn, "GET "+path+" HTTP/1.1\r\nHost: agent\r\n\r\n")
	must(t, err)
}

// Each question has its connection: nobody stays.
func TestAnOpsConnectionEndsWithItsAnswer(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	must(t, err)
	serveOps(t, l)
	conn, err := net.Dial("tcp", l.Addr().String())
	must(t, err)
	defer conn.Close()
	request(t, conn, "/livez")
	answer, err := http.ReadResponse(bufio.NewReader(conn), nil)
	must(t, err)
	defer answer.Body.Close()
	if answer.StatusCode != http.StatusOK || !answer.Close {
		t.Errorf("answered %+v", answer)
	}
}

// Those who read metrics slowly must not keep Prometheus from them.
func TestSlowReadersOfMetrics(t *testing.T) {
	l := pipes{conns: make(chan net.Conn), done: make(chan struct{})}
	serveOps(t, l)
	dial := func() net.Conn {
		near, far := net.Pipe()
		l.conns <- far
		t.Cleanup(func() { _ = near.Close() })
		return near
	}
	for range 8 {
		conn := dial()
		request(t, conn, "/metrics")
		_, err := conn.Read(make([]byte, 1))
		must(t, err)
	}
	conn := dial()
	request(t, conn, "/metrics")
	answer, err := http.ReadResponse(bufio.NewReader(conn), nil)
	must(t, err)
	defer answer.Body.Close()
	if all, err := io.ReadAll(answer.Body); err != nil || answer.StatusCode != http.StatusOK || len(all) < 8<<10 {
		t.Errorf("answered %s, %d bytes, %v", answer.Status, len(all), err)
	}
}

// pipes is a listener of pipes, which hold nothing of what is not read.
type pipes struct {
	conns chan net.Conn
	done  chan struct{}
}

func (p pipes) Accept() (net.Conn, error) {
	select {
	case conn := <-p.conns:
		return conn, nil
	case <-p.done:
		return nil, net.ErrClosed
	}
}

func (p pipes) Close() error {
	close(p.done)
	return nil
}

func (pipes) Addr() net.Addr { return &net.UnixAddr{Name: "pipes"} }
