package main

import (
	"fmt"
	"io"
	"net"
	"net/http"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/meshca/meshca/api/inbound"
)

// The kubelet ends a CA that it cannot ask: however many pods open connections and stay, there is one for it.
func TestTheOpsAddressAnswersInACrowd(t *testing.T) {
	l, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	none := func() []string { return nil }
	ended := make(chan error, 1)
	go func() { ended <- inbound.ServeOps(t.Context(), l, opsHandler(prometheus.NewRegistry(), none, none)) }()
	t.Cleanup(func() {
		if err := <-ended; err != nil {
			t.Error(err)
		}
	})
	for pod := range 65 {
		d := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.IPv4(127, 0, 5, byte(1+pod))}}
		for range 16 {
			conn, err := d.DialContext(t.Context(), "tcp4", l.Addr().String())
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { _ = conn.Close() })
			if _, err := io.WriteString(conn, "GET /livez HTTP/1.1\r\n"); err != nil { // and no more
				t.Fatal(err)
			}
		}
	}
	kubelet := http.Client{Timeout: 4 * time.Second, Transport: &http.Transport{}} // before the first of them is over
	for range 4 {
		answer, err := kubelet.Get(fmt.Sprintf("http://%s/livez", l.Addr()))
		if err != nil {
			t.Fatal(err)
		}
		_ = answer.Body.Close()
		if answer.StatusCode != http.StatusOK || !answer.Close {
			t.Errorf("answered %+v", answer)
		}
	}
}
