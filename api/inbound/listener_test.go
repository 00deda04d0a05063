package inbound

import (
	"errors"
	"io"
	"net"
	"testing"
	"time"
)

// listen makes a listener on loopback, where each connection comes from an address of the test's choice.
func listen(t *testing.T, all, perAddress int) (limited net.Listener, dial func(from string) net.Conn) {
	t.Helper()
	l, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	limited = Limit(l, all, perAddress)
	t.Cleanup(func() { _ = limited.Close() })
	return limited, func(from string) net.Conn {
		t.Helper()
		d := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(from)}}
		conn, err := d.DialContext(t.Context(), "tcp4", l.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = conn.Close() })
		return conn
	}
}

func TestConnectionsAreLimited(t *testing.T) {
	l, dial := listen(t, 3, 2)
	accepted, ended := make(chan net.Conn, 8), make(chan error, 1)
	go func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				ended <- err
				return
			}
			accepted <- conn
		}
	}()
	dial("127.0.0.1")
	dial("127.0.0.1")
	first := <-accepted
	<-accepted
	if _, err := dial("127.0.0.1").Read(make([]byte, 1)); !errors.Is(err, io.EOF) {
		t.Errorf("one too many of an address: %v", err)
	}
	dial("127.0.0.2")
	<-accepted
	dial("127.0.0.3")
	select {
	case <-accepted:
		t.Error("one too many of all is taken")
	case <-time.After(100 * time.Millisecond):
	}
	_, _ = first.Close(), first.Close() // a place is given back once
	if conn := <-accepted; Host(conn.RemoteAddr().String()) != "127.0.0.3" {
		t.Errorf("the place went to %v", conn.RemoteAddr())
	}
	dial("127.0.0.4")
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	if err := <-ended; !errors.Is(err, net.ErrClosed) {
		t.Errorf("Accept at the limit ended with %v", err)
	}
}

func TestHosts(t *testing.T) {
	for address, want := range map[string][2]string{
		"10.0.0.1:80": {"10.0.0.1", "10.0.0.1"}, "[::ffff:10.0.0.1]:80": {"10.0.0.1", "10.0.0.1"}, "pipe": {"pipe", "pipe"},
		"[2001:db8:1:2:3:4:5:6]:80": {"2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"}, "[fe80::1%eth0]:80": {"fe80::1", "fe80::/64"},
	} {
		if got := [2]string{Host(address), Network(address)}; got != want {
			t.Errorf("%s is of %s, want %s", address, got, want)
		}
	}
}

// The pods of a node, or of all, have addresses in one /64: one of them must not take the places of the others, and all of them
// not those of everybody.
func TestConnectionsOfANetworkAreLimited(t *testing.T) {
	l := &limited{places: make(chan struct{}, 8), perAddress: 2, open: map[string]int{}}
	enter := func(address string) bool {
		ok := l.enter(Host(address), Network(address))
		if ok {
			l.places <- struct{}{}
		}
		return ok
	}
	for i, want := range []bool{true, true, false} {
		if got := enter("[fd00::1]:1"); got != want {
			t.Errorf("connection %d of one pod: %v", i, got)
		}
	}
	for address, want := range map[string]bool{"[fd00::2]:1": true, "[fd00::3]:1": true} {
		if got := enter(address); got != want {
			t.Errorf("%s, beside it: %v", address, got)
		}
	}
	if enter("[fd00::4]:1") {
		t.Error("more than half of all places are one network's")
	}
	if !enter("[fd00:0:0:1::1]:1") || !enter("10.0.0.1:1") {
		t.Error("others are kept out")
	}
	l.leave("fd00::1", "fd00::/64")
	if !enter("[fd00::4]:1") {
		t.Error("a place was not given back")
	}
}
