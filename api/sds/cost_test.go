package sds

import (
	"context"
	"fmt"
	"testing"
	"time"

	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"golang.org/x/time/rate"
	"google.golang.org/protobuf/proto"
)

// unread is the wire of a peer that takes whatever it is sent.
type unread struct{ wire }

func (unread) encode(*answer) proto.Message { return &discoveryv3.DeltaDiscoveryResponse{} }

func (unread) send(proto.Message) error { return nil }

// nobodies is an open delta stream that asks for n names which are not served, and has been told so.
func nobodies(tb testing.TB, n int) (st *stream, names []string) {
	tb.Helper()
	server, err := New(Config{Source: func(context.Context) (Source, error) { return nil, nil }, Limits: Limits{NameBytes: 4 << 20}})
	if err != nil {
		tb.Fatal(err)
	}
	st = &stream{server: server, wire: unread{}, sub: newSubscription(Delta, &server.config.Limits, ""), shown: Stream{Protocol: Delta}}
	if err := server.streams.enter(st, Account{Name: "peer", Streams: 1}, server.config.Limits); err != nil {
		tb.Fatal(err)
	}
	st.load.pace = rate.NewLimiter(rate.Inf, 0)
	for i := range n {
		names = append(names, fmt.Sprintf("nobody-%05d", i))
	}
	hear(tb, st, &request{names: names})
	return st, names
}

// hear has the stream take a request and send what it owes.
func hear(tb testing.TB, st *stream, r *request) {
	tb.Helper()
	if err := st.take(r); err != nil {
		tb.Fatal(err)
	}
	if err := st.answer(tb.Context(), fixture().first); err != nil {
		tb.Fatal(err)
	}
	if st.sent != nil {
		if err := <-st.sent; err != nil {
			tb.Fatal(err)
		}
		st.sent = nil
		st.clearDeadline()
	}
	st.unread = 0
}

// A peer that changes one name of thousands must not make the server look at the others.
func TestWhatIsChangedAloneIsLookedAt(t *testing.T) {
	const many, times = 9900, 100
	st, names := nobodies(t, many)
	looked := func(r *request) int {
		t.Helper()
		if err := st.take(r); err != nil {
			t.Fatal(err)
		}
		if _, _, more, err := st.sub.next(fixture().first, st.last+1); err != nil || more {
			t.Fatal(more, err)
		}
		defer func() { st.sub.looked = 0 }()
		return st.sub.looked
	}
	for what, request := range map[string]func(name string) *request{
		"subscribes anew": func(name string) *request { return &request{names: []string{name, NameDefault}} },
		"comes and goes":  func(name string) *request { return &request{names: []string{name}, unsubscribe: []string{name}} },
		"acknowledges":    func(string) *request { return &request{nonce: nonceString(st.last)} },
	} {
		n := 0
		for i := range times {
			n += looked(request(names[i*7]))
		}
		if n > 2*times {
			t.Errorf("%s: %d names were looked at for %d requests about one", what, n, times)
		}
	}
	if got := len(st.sub.unknown(maxShown)); got != maxShown {
		t.Errorf("%d unknown names are shown", got)
	}
	if n := looked(&request{names: []string{nameWildcard}}); n < many/2 {
		t.Errorf("a wildcard looks at %d names of %d", n, many)
	}
}

// What cannot be had by looking at a few names is paid for: requests that make the server look at thousands are read
// more slowly.
func TestManyNamesArePacedAsManyRequests(t *testing.T) {
	const many, pace = 5000, 100
	names := make([]string, many)
	for i := range names {
		names[i] = fmt.Sprintf("nobody-%05d", i)
	}
	withDoor(t, func(c *Config) {
		c.Limits.RequestsPerSecond, c.Limits.RequestBytes, c.Limits.NameBytes = pace, 1<<20, 4<<20
	}, func(t *testing.T, d *door) {
		p := d.delta()
		p.say(subscribe(names...))
		p.next()
		time.Sleep(time.Minute)
		began := time.Now()
		for range pace {
			p.say(&discoveryv3.DeltaDiscoveryRequest{ResourceNamesSubscribe: []string{nameWildcard}})
		}
		p.say(subscribe("last"))
		for removed := []string(nil); len(removed) == 0 || removed[0] != "last"; time.Sleep(100 * time.Millisecond) {
			if time.Since(began) > 10*time.Minute {
				t.Fatal("the last request was never read")
			}
			for len(p.got) > 0 {
				removed = (<-p.got).GetRemovedResources()
			}
		}
		// Each looks twice at each of 5000 names, which is 40 requests' worth, at 100 a second.
		if took := time.Since(began); took < 30*time.Second || took > time.Minute {
			t.Errorf("%d requests that look at %d names each took %v", pace, many, took)
		}
	})
}

// BenchmarkResubscribe has a stream subscribe anew to one name of 10, and of 9900, none of which is served.
func BenchmarkResubscribe(b *testing.B) {
	took := map[int]time.Duration{}
	for _, n := range []int{10, 9900} {
		st, names := nobodies(b, n)
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			b.ReportAllocs()
			for i := range b.N {
				hear(b, st, &request{names: names[i%n : i%n+1]})
			}
			took[n] = b.Elapsed() / time.Duration(b.N)
			if n > 10 && took[10] > 0 {
				b.ReportMetric(float64(took[n])/float64(took[10]), "ratio")
			}
		})
	}
}
