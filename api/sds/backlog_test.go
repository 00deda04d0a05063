package sds

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"path/filepath"
	"runtime"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	secretv3 "github.com/envoyproxy/go-control-plane/envoy/service/secret/v3"
	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"

	"github.com/meshca/meshca/api/refusal"
)

// mute is a client that lets the server send nothing but headers.
type mute struct {
	conn   net.Conn
	frames *http2.Framer
	next   uint32
	closed chan struct{}
}

func newMute(t *testing.T, conn net.Conn, err error) *mute {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	m := &mute{conn: conn, frames: http2.NewFramer(conn, nil), next: 1, closed: make(chan struct{})}
	go func() { _, _ = io.Copy(io.Discard, conn); close(m.closed) }()
	_, err = io.WriteString(conn, http2.ClientPreface)
	if err = errors.Join(err, m.frames.WriteSettings(http2.Setting{ID: http2.SettingInitialWindowSize, Val: 0})); err != nil {
		t.Fatal(err)
	}
	return m
}

// ask asks for names on a stream of its own, and ends its side. The error is that of a connection that was closed.
func (m *mute) ask(names ...string) error {
	var headers bytes.Buffer
	fields := hpack.NewEncoder(&headers)
	var err error
	for _, f := range [][2]string{{":method", "POST"}, {":scheme", "http"}, {":authority", "agent"},
		{":path", secretv3.SecretDiscoveryService_DeltaSecrets_FullMethodName}, {"te", "trailers"}, {"content-type", "application/grpc"}} {
		err = errors.Join(err, fields.WriteField(hpack.HeaderField{Name: f[0], Value: f[1], Sensitive: true}))
	}
	request, fault := proto.Marshal(&discoveryv3.DeltaDiscoveryRequest{ResourceNamesSubscribe: names})
	id := m.next
	m.next += 2
	err = errors.Join(err, fault, m.frames.WriteHeaders(http2.HeadersFrameParam{StreamID: id, BlockFragment: headers.Bytes(), EndHeaders: true}))
	message := append([]byte{0, 0, byte(len(request) >> 16), byte(len(request) >> 8), byte(len(request))}, request...)
	for len(message) > 0 {
		n := min(len(message), 16<<10)
		err = errors.Join(err, m.frames.WriteData(id, n == len(message), message[:n]))
		message = message[n:]
	}
	return err
}

// long is a request for much, each time for something else.
func long(i, names int) []string {
	all := make([]string, names)
	for j := range all {
		all[j] = fmt.Sprintf("file-root:/%d/%d/%s", i, j, strings.Repeat("x", 4000))
	}
	return all
}

// What a peer does not read is kept after its streams have ended, too. It is bounded, it keeps nobody else from their
// answers, and it goes with the connection, which is closed.
func TestAnswersThatNobodyReads(t *testing.T) {
	var peer *atomic.Pointer[string]
	var refused atomic.Int64
	adjust := func(c *Config) {
		peer = everyone(c)
		c.Limits.AnswerBacklog, c.Limits.SpareAnswerBacklog, c.Limits.StreamsPerPeer = 20_000, 100_000, 24
		c.Observe.Refused = func(string, error) { refused.Add(1) }
	}
	withDoor(t, adjust, func(t *testing.T, d *door) {
		a, b := "a", "b"
		peer.Store(&a)
		var greedy []*mute
		for range 3 {
			conn, err := d.listen.DialContext(t.Context())
			greedy = append(greedy, newMute(t, conn, err))
			synctest.Wait()
		}
		for i := range 90 {
			if err := greedy[i%3].ask(long(i, 3)...); err != nil {
				t.Fatal(err)
			}
			synctest.Wait()
		}
		owed := func() (bytes int) {
			d.server.backlog.mu.Lock()
			defer d.server.backlog.mu.Unlock()
			if o := d.server.backlog.by[a]; o != nil {
				bytes = o.bytes
			}
			return bytes
		}
		if n := owed(); n < 50_000 || n > 120_000 {
			t.Errorf("%d bytes wait to be read, want no more than 120 000, and many", n)
		}
		peer.Store(&b)
		p := d.sotw()
		p.say(ask(NameDefault))
		p.next()
		if f, err := d.client.FetchSecrets(t.Context(), ask(NameDefault)); err != nil || len(f.GetResources()) != 1 {
			t.Errorf("another peer's fetch: %v", err)
		}
		time.Sleep(2*d.server.config.Limits.Send + time.Second)
		synctest.Wait()
		for _, m := range greedy {
			select {
			case <-m.closed:
			default:
				t.Error("a connection stays open of which nothing is read")
			}
		}
		if n := owed(); n != 0 || d.server.backlog.spare != 0 {
			t.Errorf("%d bytes still wait to be read, and %d of what all share", n, d.server.backlog.spare)
		}
		if refused.Load() == 0 {
			t.Error("nobody was told")
		}
		d.source.Set(fixture().later)
		wantNames(t, namesIn(t, p.next()), NameDefault)
	})
}

// Answers that found no room go out when there is some.
func TestAnswersWaitForRoom(t *testing.T) {
	adjust := func(c *Config) { c.Limits.AnswerBacklog, c.Limits.SpareAnswerBacklog = 1, 1 }
	withDoor(t, adjust, func(t *testing.T, d *door) {
		conn, err := d.listen.DialContext(t.Context())
		m := newMute(t, conn, err)
		must := func(err error) {
			t.Helper()
			if err != nil {
				t.Fatal(err)
			}
		}
		must(m.ask(long(0, 1)...))
		synctest.Wait()
		p := d.sotw()
		p.say(ask(NameDefault))
		p.quiet() // both are one peer, and what it does not read takes all the room
		if _, err := d.client.FetchSecrets(t.Context(), ask(NameDefault)); err == nil {
			t.Error("a fetch was answered that there is no room for")
		} else {
			wantReason(t, err, refusal.PeerLimit)
		}
		must(m.frames.WriteWindowUpdate(1, 1<<20))
		wantNames(t, namesIn(t, p.next()), NameDefault)
		d.source.Set(fixture().later)
		wantNames(t, namesIn(t, p.next()), NameDefault)
	})
}

// As the kernel and the garbage collector see it.
func TestWhatUnreadAnswersTake(t *testing.T) {
	first := fixture().first
	s, err := New(Config{
		Source: func(context.Context) (Source, error) {
			return SourceFunc(func() (*Secrets, <-chan struct{}) { return first, nil }), nil
		},
		Account: func(context.Context) Account { return Account{Name: "pod", Streams: 24} },
		Limits:  Limits{SpareAnswerBacklog: 1 << 20},
	})
	if err != nil {
		t.Fatal(err)
	}
	g := grpc.NewServer(s.ServerOptions()...)
	secretv3.RegisterSecretDiscoveryServiceServer(g, s)
	l, err := net.Listen("unix", filepath.Join(t.TempDir(), "s"))
	if err != nil {
		t.Fatal(err)
	}
	served := make(chan error, 1)
	go func() { served <- g.Serve(l) }()
	defer func() { g.Stop(); <-served }()
	heap := func() int {
		var m runtime.MemStats
		runtime.GC()
		runtime.GC()
		runtime.ReadMemStats(&m)
		return int(m.HeapAlloc)
	}
	before := heap()
	for i := range 16 {
		conn, err := net.Dial("unix", l.Addr().String())
		m := newMute(t, conn, err)
		for j := range 40 {
			if m.ask(long(i*40+j, 10)...) != nil {
				break // it was closed
			}
			runtime.Gosched()
		}
	}
	time.Sleep(500 * time.Millisecond) // more would have come by then
	if held := heap() - before; held > 8<<20 {
		t.Errorf("640 streams whose answers are not read take %d KiB", held>>10)
	} else {
		t.Logf("640 streams whose answers are not read take %d KiB", held>>10)
	}
}

// What grpc took from a stream as its connection ended is not owed for ever, and no trouble of the peer's.
func TestAnAnswerAtTheEndIsForgotten(t *testing.T) {
	withDoor(t, nil, func(t *testing.T, d *door) {
		l := &line{server: d.server, account: Account{Name: "pod", Streams: 1}}
		l.opened()
		l.ended(1)
		if !l.owe(1000) {
			t.Fatal("there is no room")
		}
		time.Sleep(3 * d.server.config.Limits.Send)
		synctest.Wait()
		if n := len(d.server.backlog.by); n != 0 || d.refused != 0 {
			t.Errorf("%d accounts owe something, %d refusals were told", n, d.refused)
		}
	})
}
