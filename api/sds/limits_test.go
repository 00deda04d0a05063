package sds

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
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
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/meshca/meshca/api/refusal"
)

func TestTenThousandNames(t *testing.T) {
	names := make([]string, 10_000)
	for i := range names {
		names[i] = fmt.Sprintf("file-root:/etc/roots/%05d.pem", i)
		if i%2 == 0 {
			names[i] = fmt.Sprintf("spiffe://td.test/ns/a/sa/nobody-%05d", i)
		}
	}
	names[0], names[1] = NameDefault, NameRootCA
	withDoor(t, nil, func(t *testing.T, d *door) {
		p := d.sotw()
		p.say(ask(names...))
		r := p.next()
		if got := len(r.GetResources()); got != 5001 {
			t.Fatalf("%d secrets came, want 5001", got)
		}
		p.say(ack(r, names...))
		p.quiet()
		p.say(ack(r, append(names, "one more")...))
		err := p.ended()
		wantReason(t, err, refusal.PeerLimit)
		if !strings.Contains(err.Error(), "limit: Names") {
			t.Errorf("the refusal does not name the limit: %v", err)
		}

		q := d.delta()
		q.say(subscribe(names...))
		s := q.next()
		if len(s.GetResources()) != 5001 || len(s.GetRemovedResources()) != 4999 {
			t.Fatalf("%d secrets and %d removals came", len(s.GetResources()), len(s.GetRemovedResources()))
		}
		d.source.Set(fixture().later)
		wantNames(t, deltaNames(t, q.next()), NameDefault)
		q.say(subscribe("one more"))
		wantReason(t, q.ended(), refusal.PeerLimit)

		f, err := d.client.FetchSecrets(t.Context(), ask(names...))
		if err != nil || len(f.GetResources()) != 5001 {
			t.Fatalf("fetch: %d secrets, %v", len(f.GetResources()), err)
		}
		_, err = d.client.FetchSecrets(t.Context(), ask(append(names, "one more")...))
		wantReason(t, err, refusal.PeerLimit)
		_, err = d.client.FetchSecrets(t.Context(), ask(strings.Repeat("x", 1<<20)))
		if status.Code(err) != codes.ResourceExhausted {
			t.Errorf("a request of a MiB: %v", err)
		}
		if synctest.Wait(); d.refused != 3 { // grpc itself refuses the last one
			t.Errorf("%d refusals were told, want 3: of two streams and a fetch", d.refused)
		}
	})
}

func TestLongNames(t *testing.T) {
	withDoor(t, func(c *Config) { c.Limits.NameBytes, c.Limits.SpareNameBytes = 10_000, 1 }, func(t *testing.T, d *door) {
		p := d.sotw()
		p.say(ask(strings.Repeat("x", maxName+1)))
		wantReason(t, p.ended(), refusal.RequestMalformed)
		q := d.delta()
		q.say(subscribe(strings.Repeat("x", 6000)))
		wantNames(t, q.next().GetRemovedResources(), strings.Repeat("x", 6000))
		q.say(subscribe(strings.Repeat("y", 4001)))
		err := q.ended()
		wantReason(t, err, refusal.PeerLimit)
		if !strings.Contains(err.Error(), "NameBytes") {
			t.Errorf("the refusal does not name the limit: %v", err)
		}
	})
}

func TestLargeAnswersAreSplit(t *testing.T) {
	const size = 1000
	withDoor(t, func(c *Config) { c.Limits.AnswerBytes = size }, func(t *testing.T, d *door) {
		var names []string
		for i := range 50 {
			names = append(names, fmt.Sprintf("file-root:/%02d", i), fmt.Sprintf("nobody-%02d", i))
		}
		p := d.sotw()
		p.say(ask(append(names, NameRootCA)...))
		seen := map[string]bool{}
		for len(seen) < 51 {
			r := p.next()
			bytes := 0
			for name := range secretsIn(t, r.GetResources()) {
				if seen[name] {
					t.Fatalf("%s came twice", name)
				}
				seen[name] = true
			}
			for _, any := range r.GetResources() {
				bytes += len(any.GetValue())
			}
			if bytes > size && len(r.GetResources()) > 1 {
				t.Errorf("%d secrets of %d bytes are in one answer", len(r.GetResources()), bytes)
			}
		}
		p.quiet()

		q := d.delta()
		q.say(subscribe(names...))
		known, removed := 0, 0
		for known+removed < len(names) {
			r := q.next()
			known += len(r.GetResources())
			removed += len(r.GetRemovedResources())
		}
		if known != 50 || removed != 50 {
			t.Errorf("%d secrets and %d removals came", known, removed)
		}
		q.quiet()
		_, err := d.client.FetchSecrets(t.Context(), ask(names...))
		wantReason(t, err, refusal.PeerLimit)
	})
}

func TestStreamLimits(t *testing.T) {
	peerName := func(context.Context) string { return "peer" }
	withDoor(t, func(c *Config) { c.Limits.StreamsPerPeer = 3; c.Peer = peerName }, func(t *testing.T, d *door) {
		for range 3 {
			p := d.sotw()
			p.say(ask(NameDefault))
			p.next()
		}
		wantReason(t, d.delta().ended(), refusal.PeerLimit)
		_, err := d.client.FetchSecrets(t.Context(), ask())
		wantReason(t, err, refusal.PeerLimit)
	})
	withDoor(t, func(c *Config) { c.Limits.Streams = 2 }, func(t *testing.T, d *door) {
		for range 2 {
			p := d.sotw()
			p.say(ask(NameDefault))
			p.next()
		}
		wantReason(t, d.sotw().ended(), refusal.Overloaded)
	})
	withDoor(t, func(c *Config) { c.Limits.StreamsPerConnection = 1 }, func(t *testing.T, d *door) {
		p := d.sotw()
		p.say(ask(NameDefault))
		p.next()
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if _, err := d.client.StreamSecrets(ctx); status.Code(err) != codes.DeadlineExceeded {
			t.Errorf("a second stream on the connection: %v", err)
		}
	})
}

func TestRequestsArePaced(t *testing.T) {
	withDoor(t, func(c *Config) { c.Limits.RequestsPerSecond = 5 }, func(t *testing.T, d *door) {
		p := d.delta()
		for i := range 20 {
			p.say(subscribe(fmt.Sprint("nobody-", i)))
		}
		if got := d.one().Names; got != 5 {
			t.Errorf("%d requests were read at once, want 5", got)
		}
		time.Sleep(time.Second)
		if got := d.one().Names; got != 10 {
			t.Errorf("%d requests were read after a second, want 10", got)
		}
		time.Sleep(2 * time.Second)
		if got := d.one().Names; got != 20 {
			t.Errorf("%d of 20 requests were read after 3 s at 5 a second", got)
		}
	})
}

// everyone names the peer of what is opened next.
func everyone(c *Config) *atomic.Pointer[string] {
	var name atomic.Pointer[string]
	c.Peer = func(context.Context) string { return *name.Load() }
	return &name
}

// Of the names beyond what each has for itself there are so many for all, whoever asks first.
func TestPeersShareWhatIsSpare(t *testing.T) {
	var peer *atomic.Pointer[string]
	adjust := func(c *Config) { c.Limits.NameBytes, c.Limits.SpareNameBytes, peer = 10_000, 10_000, everyone(c) }
	withDoor(t, adjust, func(t *testing.T, d *door) {
		a, b := "a", "b"
		asks := func(who *string, size int) *caller[discoveryv3.DiscoveryRequest, discoveryv3.DiscoveryResponse] {
			peer.Store(who)
			p := d.sotw()
			p.say(ask(strings.Repeat("x", size/3), strings.Repeat("y", size/3), strings.Repeat("z", size/3)))
			return p
		}
		first := asks(&a, 17_000)
		first.quiet()
		wantReason(t, asks(&b, 17_000).ended(), refusal.PeerLimit)
		asks(&b, 9_000).quiet() // its own
		err := asks(&b, 5_000).ended()
		wantReason(t, err, refusal.PeerLimit)
		if !strings.Contains(err.Error(), "limit: SpareNameBytes") {
			t.Errorf("the refusal does not name the limit: %v", err)
		}
		if err := first.half(); err != nil {
			t.Fatal(err)
		}
		if err := first.ended(); err != io.EOF {
			t.Fatal(err)
		}
		asks(&b, 5_000).quiet() // what the other has given back
		if d.server.streams.spare == 0 {
			t.Error("nothing is counted as spare that is taken")
		}
	})
}

// Large requests are kept while they arrive, so there are few of them at a time; small ones need none of those places.
func TestLargeRequestsAreFew(t *testing.T) {
	var peer *atomic.Pointer[string]
	adjust := func(c *Config) { c.Limits.LargeRequests, peer = 2, everyone(c) }
	withDoor(t, adjust, func(t *testing.T, d *door) {
		a, b := "a", "b"
		large := make([]string, 3000)
		for i := range large {
			large[i] = fmt.Sprintf("spiffe://td.test/ns/a/sa/nobody-%05d", i)
		}
		peer.Store(&a)
		var greedy []<-chan struct{}
		for range 2 {
			greedy = append(greedy, d.raw([]byte{0, 0, 8, 0, 0})) // says that 512 KiB will come
			synctest.Wait()
		}
		peer.Store(&b)
		f, err := d.client.FetchSecrets(t.Context(), ask(append(large, NameDefault)...))
		if err != nil || len(f.GetResources()) != 1 {
			t.Fatalf("another peer's large request: %v", err)
		}
		synctest.Wait()
		select {
		case <-greedy[0]:
		default:
			t.Error("the oldest of the greedy peer's connections stays open")
		}
		select {
		case <-greedy[1]:
			t.Error("the other one was closed too")
		default:
		}
	})
}

// What a peer may cost it may cost once, not on each of its streams.
func TestNamesOfAPeerAddUp(t *testing.T) {
	var peer *atomic.Pointer[string]
	adjust := func(c *Config) { c.Limits.NameBytes, c.Limits.SpareNameBytes, peer = 10_000, 1, everyone(c) }
	withDoor(t, adjust, func(t *testing.T, d *door) {
		a, b := "a", "b"
		long := strings.Repeat("x", 6000)
		peer.Store(&a)
		first, second := d.delta(), d.sotw()
		first.say(subscribe(long))
		first.next()
		second.say(ask(long))
		err := second.ended()
		wantReason(t, err, refusal.PeerLimit)
		if !strings.Contains(err.Error(), "NameBytes") {
			t.Errorf("the refusal does not name the limit: %v", err)
		}
		_, err = d.client.FetchSecrets(t.Context(), ask(long, NameRootCA))
		wantReason(t, err, refusal.PeerLimit)
		many := make([]string, 100)
		for i := range many {
			many[i] = fmt.Sprint(i) // short, but each is kept
		}
		third := d.delta()
		third.say(subscribe(many...))
		wantReason(t, third.ended(), refusal.PeerLimit)

		peer.Store(&b)
		other := d.sotw()
		other.say(ask(long))
		other.quiet()

		// What is given up can be asked for again.
		peer.Store(&a)
		first.say(&discoveryv3.DeltaDiscoveryRequest{ResourceNamesUnsubscribe: []string{long}})
		first.quiet()
		fourth := d.sotw()
		fourth.say(ask(long))
		fourth.quiet()
		if err := fourth.half(); err != nil {
			t.Fatal(err)
		}
		if err := fourth.ended(); err != io.EOF {
			t.Fatal(err)
		}
		fifth := d.sotw()
		fifth.say(ask(long))
		fifth.quiet()
	})
}

func TestRequestsArePacedOverAPeer(t *testing.T) {
	var peer *atomic.Pointer[string]
	adjust := func(c *Config) { c.Limits.RequestsPerSecond, peer = 5, everyone(c) }
	withDoor(t, adjust, func(t *testing.T, d *door) {
		a, b := "a", "b"
		read := func() (n int) {
			synctest.Wait()
			for _, s := range d.server.Streams() {
				n += s.Names
			}
			return n
		}
		peer.Store(&a)
		began := time.Now()
		p, q := d.delta(), d.delta()
		for i := range 5 {
			p.say(subscribe(fmt.Sprint("nobody-", i)))
			q.say(subscribe(fmt.Sprint("nobody-", i)))
		}
		if got := read(); got != 5 {
			t.Errorf("%d requests of two streams were read at once, want 5", got)
		}
		peer.Store(&b)
		if _, err := d.client.FetchSecrets(t.Context(), ask(NameDefault)); err != nil || time.Since(began) > 0 {
			t.Errorf("another peer waits for this one: %v", err)
		}
		time.Sleep(time.Second + 200*time.Millisecond) // each stream takes its turn before it reads: one has read all that came
		if got := read(); got != 10 {
			t.Errorf("%d requests were read after a second, want 10", got)
		}

		// A fetch has its turn, in time or not at all; leaving and coming back brings no new burst.
		peer.Store(&a)
		ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
		defer cancel()
		if _, err := d.client.FetchSecrets(ctx, ask(NameDefault)); err == nil {
			t.Error("a fetch was answered before its turn")
		}
		for _, s := range []func() error{p.half, q.half} {
			if err := s(); err != nil {
				t.Fatal(err)
			}
		}
		synctest.Wait()
		start := time.Now()
		for range 10 {
			if _, err := d.client.FetchSecrets(t.Context(), ask(NameDefault)); err != nil {
				t.Fatal(err)
			}
		}
		if took := time.Since(start); took < 1900*time.Millisecond || took > 2500*time.Millisecond { // the streams had taken two turns
			t.Errorf("ten fetches at five a second took %v", took)
		}

		// Who has left is forgotten in the end.
		time.Sleep(time.Minute)
		peer.Store(&b)
		if _, err := d.client.FetchSecrets(t.Context(), ask(NameDefault)); err != nil {
			t.Fatal(err)
		}
		if _, known := d.server.streams.peers[a]; known {
			t.Error("a peer that left a minute ago is still kept")
		}
	})
}

func TestRequestBytes(t *testing.T) {
	withDoor(t, func(c *Config) { c.Limits.RequestBytes, c.Limits.LargeRequestBytes = 5_000, 10_000 }, func(t *testing.T, d *door) {
		p := d.sotw()
		p.say(ask(strings.Repeat("x", 6000), strings.Repeat("y", 6000)))
		if err := p.ended(); status.Code(err) != codes.ResourceExhausted {
			t.Errorf("a request that is too large: %v", err)
		}
		if synctest.Wait(); d.refused != 1 {
			t.Errorf("%d refusals were told, want 1", d.refused)
		}
	})
}

// halfSent opens calls without a message: streams by the protocol's word, and fetches by a client that says nothing.
func (d *door) halfSent(method string) grpc.ClientStream {
	d.t.Helper()
	g, err := d.conn.NewStream(d.t.Context(), &grpc.StreamDesc{ClientStreams: true, ServerStreams: true}, "/envoy.service.secret.v3.SecretDiscoveryService/"+method)
	if err != nil {
		d.t.Fatal(err)
	}
	return g
}

// raw opens a stream over a connection of its own and says just that on it; the channel is closed when the connection is.
func (d *door) raw(said ...[]byte) (closed <-chan struct{}) {
	d.t.Helper()
	conn, err := d.listen.DialContext(d.t.Context())
	if err != nil {
		d.t.Fatal(err)
	}
	d.t.Cleanup(func() { _ = conn.Close() })
	heard := make(chan struct{})
	go func() { _, _ = io.Copy(io.Discard, conn); close(heard) }()
	var headers, all bytes.Buffer
	fields := hpack.NewEncoder(&headers)
	for _, f := range [][2]string{{":method", "POST"}, {":scheme", "http"}, {":authority", "agent"},
		{":path", secretv3.SecretDiscoveryService_StreamSecrets_FullMethodName}, {"te", "trailers"}, {"content-type", "application/grpc"}} {
		err = errors.Join(err, fields.WriteField(hpack.HeaderField{Name: f[0], Value: f[1]}))
	}
	all.WriteString(http2.ClientPreface)
	frames := http2.NewFramer(&all, nil)
	err = errors.Join(err, frames.WriteSettings(),
		frames.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: headers.Bytes(), EndHeaders: true}))
	for _, p := range said {
		err = errors.Join(err, frames.WriteData(1, false, p))
	}
	if err != nil {
		d.t.Fatal(err)
	}
	if _, err := conn.Write(all.Bytes()); err != nil {
		d.t.Fatal(err)
	}
	return heard
}

// What is half sent is kept for as long as its call is open, so it counts from the call's headers on, and ends in time.
func TestCallsThatAreHalfSent(t *testing.T) {
	for _, method := range []string{"FetchSecrets", "StreamSecrets", "DeltaSecrets"} {
		withDoor(t, nil, func(t *testing.T, d *door) {
			most := d.server.config.Limits.StreamsPerPeer
			var open []grpc.ClientStream
			for range most {
				open = append(open, d.halfSent(method))
			}
			synctest.Wait()
			if n := len(d.server.calls.open); n != 1 {
				t.Fatalf("%s: the calls of %d peers are counted, want those of one", method, n)
			}
			err := d.halfSent(method).RecvMsg(&discoveryv3.DiscoveryResponse{})
			wantReason(t, err, refusal.PeerLimit)
			if _, err := d.client.FetchSecrets(t.Context(), ask()); refusal.Of(err) != refusal.PeerLimit {
				t.Errorf("%s: one more: %v", method, err)
			}
			time.Sleep(d.server.config.Limits.FirstRequest + time.Second)
			synctest.Wait()
			if n := len(d.server.calls.open); n != 0 {
				t.Errorf("%s: calls of %d peers are open after %s", method, n, d.server.config.Limits.FirstRequest)
			}
			for _, g := range open {
				if err := g.RecvMsg(&discoveryv3.DiscoveryResponse{}); err == nil || g.Context().Err() == nil {
					t.Fatalf("%s: its peer is not told: %v", method, err)
				}
			}
			if _, err := d.client.FetchSecrets(t.Context(), ask(NameDefault)); err != nil {
				t.Errorf("%s: after they have ended: %v", method, err)
			}
		})
	}
}

// A fetch that waits for its secrets has arrived: that it waits long is not its doing.
func TestAFetchThatArrivedIsNotHastened(t *testing.T) {
	slowly := func(c *Config) {
		find := c.Source
		c.Source = func(ctx context.Context) (Source, error) { time.Sleep(5 * time.Second); return find(ctx) }
	}
	withDoor(t, slowly, func(t *testing.T, d *door) {
		d.source.Set(nil)
		_, err := d.client.FetchSecrets(t.Context(), ask(NameDefault))
		wantReason(t, err, refusal.SVIDPending) // its own word, not that of a call that was cut off
	})
}

// That the first request came gives a stream no more time for the next.
func TestLaterRequestsThatAreHalfSent(t *testing.T) {
	withDoor(t, nil, func(t *testing.T, d *door) {
		heard := d.raw([]byte{0, 0, 0, 0, 0}, // asks for everything
			[]byte{0, 0, 0, 0, 9, 1})
		synctest.Wait()
		if n := len(d.server.Streams()); n != 1 {
			t.Fatalf("%d streams have asked", n)
		}
		time.Sleep(d.server.config.Limits.FirstRequest + time.Second)
		synctest.Wait()
		if n := len(d.server.Streams()); n != 0 {
			t.Errorf("%d streams are open that owe the rest of a request", n)
		}
		select {
		case <-heard:
		default:
			t.Error("the connection stays open")
		}
	})
}

// Requests that nobody reads take memory, whole ones too, and the smallest take most for what is in them. Those that are
// read at once are as many as a peer likes, within its pace.
func TestRequestsThatWaitToBeRead(t *testing.T) {
	slow := func(c *Config) { c.Limits.RequestsPerSecond = 1 }
	for what, c := range map[string]struct {
		adjust func(*Config)
		of     string
		stands bool
	}{"at once": {nil, TypeURL, true}, "slowly": {slow, TypeURL, false}, "slowly, nothing in them": {slow, "", false}} {
		withDoor(t, c.adjust, func(t *testing.T, d *door) {
			p := d.delta()
			p.say(subscribe(NameDefault))
			p.next()
			for i := range 700 { // less than a window
				p.say(&discoveryv3.DeltaDiscoveryRequest{TypeUrl: c.of})
				if i%100 == 0 {
					synctest.Wait()
				}
			}
			synctest.Wait()
			if stands := len(d.server.Streams()) == 1; stands != c.stands {
				t.Errorf("%s: the stream is open: %v, want %v", what, stands, c.stands)
			}
		})
	}
}

// Peers of one account share what one may cost, and the account may have other bounds than a peer.
func TestPeersOfOneAccount(t *testing.T) {
	var peer *atomic.Pointer[string]
	adjust := func(c *Config) {
		c.Limits.NameBytes, c.Limits.SpareNameBytes, c.Limits.StreamsPerPeer, peer = 10_000, 1, 3, everyone(c)
		c.Account = func(ctx context.Context) Account {
			if name := c.Peer(ctx); strings.HasPrefix(name, "pod") {
				return Account{Name: "pod", Streams: 2}
			}
			return Account{Name: c.Peer(ctx)}
		}
	}
	withDoor(t, adjust, func(t *testing.T, d *door) {
		one, two, other := "pod/1", "pod/2", "other"
		long := strings.Repeat("x", 6000)
		peer.Store(&one)
		first := d.delta()
		first.say(subscribe(long))
		first.next()
		peer.Store(&two)
		_, err := d.client.FetchSecrets(t.Context(), ask(long))
		wantReason(t, err, refusal.PeerLimit)
		second := d.sotw()
		second.say(ask(NameDefault))
		second.next()
		if shown := d.server.Streams(); len(shown) != 2 || shown[0].Peer == shown[1].Peer {
			t.Errorf("the peers are not told apart: %+v", shown)
		}
		wantReason(t, d.sotw().ended(), refusal.PeerLimit)
		peer.Store(&other)
		for range 3 {
			p := d.delta()
			p.say(subscribe(NameDefault))
			p.next()
		}
		wantReason(t, d.sotw().ended(), refusal.PeerLimit)
	})
}

// The pods of one node, each at the bounds that an agent has for it (agent.Config), must fit into what the chart gives an
// agent, 512 MiB, beside what the agent needs by itself. How many volumes a pod has does not count. What a stream and a
// connection take of their own was measured, with what the garbage collector leaves: 1000 of each. So was what a piece
// takes that is not read yet: streams full of pieces of 5 bytes to 16 KiB.
func TestWhatANodesPodsCanHold(t *testing.T) {
	l := Limits{}.withDefaults()
	const (
		pods, streams, connections = 110, 24, 16
		perStream, perConnection   = 20 << 10, 24 << 10
		perPiece                   = 80
		// A large request takes twice its size as it comes, and ten times its size where it has names of one byte alone.
		perLarge = 12
		most     = 440 << 20
	)
	each := streams*(max(l.RequestBytes, window)+maxUnread*perPiece+perStream) + connections*perConnection + l.NameBytes + l.AnswerBacklog
	shared := l.SpareNameBytes + l.SpareAnswerBacklog + l.LargeRequests*perLarge*l.LargeRequestBytes
	if pods*each+shared > most {
		t.Errorf("a pod can hold %d KiB, %d of them %d MiB, and all what they share: %d MiB", each>>10, pods, pods*each>>20, shared>>20)
	}
	t.Logf("a pod can hold %d KiB, %d of them %d MiB, and all what they share: %d MiB", each>>10, pods, pods*each>>20, shared>>20)
}

func TestConfigIsChecked(t *testing.T) {
	source := func(context.Context) (Source, error) { return nil, nil }
	for want, c := range map[string]Config{
		"needs a Source": {},
		"negative":       {Source: source, Limits: Limits{Names: -1}},
	} {
		if _, err := New(c); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("got %v, want an error with %q", err, want)
		}
	}
}
