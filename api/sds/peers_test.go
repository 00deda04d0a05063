package sds

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	tlsv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/v3"
	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/structpb"

	"github.com/meshca/meshca/api/refusal"
)

func wantReason(t *testing.T, err error, want refusal.Reason) {
	t.Helper()
	if got := refusal.Of(err); got != want {
		t.Fatalf("got %v (%s), want %s", err, got, want)
	}
}

func TestSourceRefusesThePeer(t *testing.T) {
	for want, source := range map[refusal.Reason]func(context.Context) (Source, error){
		refusal.PodGone:  func(context.Context) (Source, error) { return nil, refusal.New(refusal.PodGone, "gone") },
		refusal.Internal: func(context.Context) (Source, error) { return nil, errors.New("a secret of ours") },
	} {
		withDoor(t, func(c *Config) { c.Source = source }, func(t *testing.T, d *door) {
			err := d.sotw().ended()
			wantReason(t, err, want)
			if strings.Contains(err.Error(), "a secret of ours") {
				t.Errorf("the peer is told %v", err)
			}
			wantReason(t, d.delta().ended(), want)
			_, err = d.client.FetchSecrets(t.Context(), ask())
			wantReason(t, err, want)
		})
	}
}

func TestEndEndsTheStreams(t *testing.T) {
	withDoor(t, nil, func(t *testing.T, d *door) {
		p, q := d.sotw(), d.delta()
		p.say(ask(NameDefault))
		q.say(subscribe(NameDefault))
		p.next()
		q.next()
		d.source.Set(End(refusal.New(refusal.PodGone, "pod a/web is gone")))
		wantReason(t, p.ended(), refusal.PodGone)
		wantReason(t, q.ended(), refusal.PodGone)
		wantReason(t, d.sotw().ended(), refusal.PodGone)
		_, err := d.client.FetchSecrets(t.Context(), ask())
		wantReason(t, err, refusal.PodGone)
	})
}

// What was taken away ends the streams that were open, once, also where other news came before they looked. Who comes back
// stays, and has what is left; so does who still waited for the first secrets.
func TestPartingEndsWhatWasOpen(t *testing.T) {
	withDoor(t, nil, func(t *testing.T, d *door) {
		bundles := []*spiffebundle.Bundle{fixture().root.Bundle(1)}
		left := func(p *Parting) *Secrets {
			s, err := NewSecrets(SecretsConfig{Bundles: bundles, Parting: p})
			if err != nil {
				t.Fatal(err)
			}
			return s
		}
		first, second := &Parting{refusal.New(refusal.IdentityDenied, "denied")}, &Parting{refusal.New(refusal.PolicyDenied, "and again")}
		all := []string{NameDefault, NameRootCA}

		p, q := d.sotw(), d.delta()
		p.say(ask(all...))
		q.say(subscribe(all...))
		p.next()
		q.next()
		d.source.Set(left(first))
		d.source.Set(left(first)) // the next bundle
		wantReason(t, p.ended(), refusal.IdentityDenied)
		wantReason(t, q.ended(), refusal.IdentityDenied)

		p, q = d.sotw(), d.delta()
		p.say(ask(all...))
		q.say(subscribe(all...))
		if got := p.next(); len(got.GetResources()) != 1 {
			t.Errorf("who comes back has %v", got)
		}
		if got := q.next(); len(got.GetResources()) != 1 || !slices.Equal(got.GetRemovedResources(), []string{NameDefault}) {
			t.Errorf("who comes back has %v", got)
		}
		d.source.Set(left(first))
		p.quiet()
		q.quiet()

		d.source.Set(left(second))
		wantReason(t, p.ended(), refusal.PolicyDenied)
		wantReason(t, q.ended(), refusal.PolicyDenied)

		d.source.Set(nil)
		p = d.sotw()
		p.say(ask(all...))
		p.quiet()
		d.source.Set(left(&Parting{refusal.New(refusal.PolicyDenied, "it had nothing of it")}))
		p.next()
		p.quiet()
	})
}

func TestPeerThatGoesAway(t *testing.T) {
	withDoor(t, nil, func(t *testing.T, d *door) {
		ctx, cancel := context.WithCancel(t.Context())
		s, err := d.client.StreamSecrets(ctx)
		if err != nil {
			t.Fatal(err)
		}
		if err := s.Send(ask(NameDefault)); err != nil {
			t.Fatal(err)
		}
		d.one()
		cancel()
		synctest.Wait()
		if n := len(d.server.Streams()); n != 0 {
			t.Errorf("%d streams are open after the peer went away", n)
		}
		if len(d.closed) != 1 {
			t.Errorf("told as closed: %v", d.closed)
		}
	})
}

func TestSilentPeer(t *testing.T) {
	withDoor(t, func(c *Config) { c.Limits.FirstRequest = 3 * time.Second }, func(t *testing.T, d *door) {
		p, talker := d.sotw(), d.sotw()
		talker.say(ask(NameDefault))
		talker.next()
		time.Sleep(3*time.Second - time.Millisecond)
		p.quiet()
		time.Sleep(time.Millisecond)
		err := p.ended()
		wantReason(t, err, refusal.PeerLimit)
		if !strings.Contains(err.Error(), "FirstRequest") {
			t.Errorf("the refusal does not name the limit: %v", err)
		}
		time.Sleep(time.Hour)
		talker.quiet() // who has asked may be silent for ever
	})
}

// TestSlowPeer has a peer that asks and does not read. HTTP/2 takes 64 KiB for it; then it owes us the reading of one
// answer, others are served, and in the end it is told off.
func TestSlowPeer(t *testing.T) {
	big := bigSecrets(t, 400)
	withDoor(t, func(c *Config) { c.Limits.Send = 5 * time.Second }, func(t *testing.T, d *door) {
		s, err := d.client.StreamSecrets(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if err := s.Send(ask(NameAll)); err != nil {
			t.Fatal(err)
		}
		d.source.Set(big)
		reader := d.sotw()
		reader.say(ask(NameDefault))
		reader.next()
		for i := range 20 {
			d.source.Set([]*Secrets{fixture().later, big}[i%2])
			synctest.Wait()
		}
		if got := len(d.server.Streams()); got != 2 {
			t.Fatalf("%d streams are open, want both: the slow one has time yet", got)
		}
		for len(reader.got) > 0 {
			<-reader.got
		}
		d.source.Set(fixture().first)
		wantNames(t, namesIn(t, reader.next()), NameDefault)
		time.Sleep(5 * time.Second)
		synctest.Wait()
		if n := len(d.server.Streams()); n != 1 {
			t.Errorf("%d streams are open, want the reader's alone", n)
		}
		d.mu.Lock()
		if len(d.closed) != 1 || refusal.Of(d.closed[0]) != refusal.PeerLimit {
			t.Errorf("closed with %v", d.closed)
		}
		d.mu.Unlock()
		reader.quiet()
		// What was never read is still kept, until the connection goes.
		time.Sleep(10 * time.Second)
		if err := reader.ended(); status.Code(err) != codes.Unavailable {
			t.Errorf("the connection stays: %v", err)
		}
		d.server.backlog.mu.Lock()
		defer d.server.backlog.mu.Unlock()
		if n := len(d.server.backlog.by); n != 0 || d.server.backlog.spare != 0 {
			t.Errorf("%d accounts owe something, and %d bytes of what is spare", n, d.server.backlog.spare)
		}
	})
}

// bigSecrets has a validation context of n roots.
func bigSecrets(t *testing.T, n int) *Secrets {
	t.Helper()
	f := fixture()
	bundle := f.root.Bundle(3)
	template := f.root.Cert
	for i := range n {
		c := *template
		c.Raw = append(append([]byte{}, template.Raw...), fmt.Sprintf("%04d", i)...)
		bundle.AddX509Authority(&c)
	}
	s, err := NewSecrets(SecretsConfig{SVIDs: []*x509svid.SVID{f.web2}, Bundles: []*spiffebundle.Bundle{bundle}})
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func TestUnknownTypeURL(t *testing.T) {
	withDoor(t, nil, func(t *testing.T, d *door) {
		const other = "type.googleapis.com/envoy.config.cluster.v3.Cluster"
		p := d.sotw()
		r := ask(NameDefault)
		r.TypeUrl = other
		p.say(r)
		wantReason(t, p.ended(), refusal.TypeURLUnknown)

		q := d.delta()
		q.say(subscribe(NameDefault))
		q.next()
		s := subscribe(NameDefault)
		s.TypeUrl = other
		q.say(s)
		err := q.ended()
		wantReason(t, err, refusal.TypeURLUnknown)
		if status.Code(err) != codes.InvalidArgument {
			t.Errorf("code %s", status.Code(err))
		}
		_, err = d.client.FetchSecrets(t.Context(), r)
		wantReason(t, err, refusal.TypeURLUnknown)
	})
}

func TestPlainValidation(t *testing.T) {
	plain := func(t *testing.T, secrets map[string]*tlsv3.Secret) bool {
		t.Helper()
		c := secrets[NameRootCA].GetValidationContext()
		if (c.GetTrustedCa() == nil) == (c.GetCustomValidatorConfig() == nil) {
			t.Fatalf("neither or both forms: %v", c)
		}
		return c.GetTrustedCa() != nil
	}
	node := func(v *structpb.Value) *corev3.Node {
		return &corev3.Node{Id: "n", Metadata: &structpb.Struct{Fields: map[string]*structpb.Value{
			"disable_spiffe_cert_validation": v,
		}}}
	}
	for _, c := range []struct {
		name   string
		node   *corev3.Node
		config bool
		want   bool
	}{
		{"no node", nil, false, false},
		{"true", node(structpb.NewBoolValue(true)), false, true},
		{"false", node(structpb.NewBoolValue(false)), false, false},
		{"string", node(structpb.NewStringValue("TRUE")), false, true},
		{"other string", node(structpb.NewStringValue("yes")), false, false},
		{"number", node(structpb.NewNumberValue(1)), false, false},
		{"config", nil, true, true},
		{"config against node", node(structpb.NewBoolValue(false)), true, true},
	} {
		t.Run(c.name, func(t *testing.T) {
			withDoor(t, func(conf *Config) { conf.PlainValidation = c.config }, func(t *testing.T, d *door) {
				p := d.sotw()
				r := ask(NameRootCA)
				r.Node = c.node
				p.say(r)
				first := p.next()
				if got := plain(t, secretsIn(t, first.GetResources())); got != c.want {
					t.Errorf("stream: plain = %v", got)
				}
				p.say(ack(first, NameRootCA)) // without a node: the first one holds
				p.quiet()
				f, err := d.client.FetchSecrets(t.Context(), r)
				if err != nil {
					t.Fatal(err)
				}
				if got := plain(t, secretsIn(t, f.GetResources())); got != c.want {
					t.Errorf("fetch: plain = %v", got)
				}
			})
		})
	}
}

func TestFetch(t *testing.T) {
	withDoor(t, nil, func(t *testing.T, d *door) {
		r, err := d.client.FetchSecrets(t.Context(), ask(NameDefault, NameRootCA, "nobody"))
		if err != nil {
			t.Fatal(err)
		}
		wantNames(t, namesIn(t, r), NameDefault, NameRootCA)
		if len(d.unknown) != 1 {
			t.Errorf("unknown names told: %q", d.unknown)
		}
		r, err = d.client.FetchSecrets(t.Context(), ask())
		if err != nil {
			t.Fatal(err)
		}
		wantNames(t, namesIn(t, r), webID, adminID, ownTD, otherTD)
		_, err = d.client.FetchSecrets(t.Context(), ask("nobody"))
		wantReason(t, err, refusal.SecretUnknown)
	})
}

func TestFetchWaitsForTheFirstSecrets(t *testing.T) {
	withDoor(t, nil, func(t *testing.T, d *door) {
		d.source.Set(nil)
		start := time.Now()
		_, err := d.client.FetchSecrets(t.Context(), ask(NameDefault))
		wantReason(t, err, refusal.SVIDPending)
		if took := time.Since(start); took != 10*time.Second {
			t.Errorf("it waited %s", took)
		}
		if _, err := d.client.FetchSecrets(t.Context(), ask("file-root:/r")); err != nil {
			t.Errorf("a file's name needs no secrets: %v", err)
		}
		go func() {
			time.Sleep(2 * time.Second)
			d.source.Set(fixture().first)
		}()
		if _, err := d.client.FetchSecrets(t.Context(), ask(NameDefault)); err != nil {
			t.Error(err)
		}
	})
}

// A source may learn late that what it gives out no longer holds. It is asked at each send, so that nothing goes out
// that it would not give out now.
func TestSourceIsAskedAtEachSend(t *testing.T) {
	var now atomic.Pointer[Secrets]
	now.Store(fixture().first)
	adjust := func(c *Config) {
		c.Source = func(context.Context) (Source, error) {
			return SourceFunc(func() (*Secrets, <-chan struct{}) { return now.Load(), nil }), nil
		}
	}
	withDoor(t, adjust, func(t *testing.T, d *door) {
		p := d.delta()
		p.say(subscribe(NameDefault))
		first := p.next()
		now.Store(fixture().later)
		p.say(subscribe(NameDefault))
		if second := p.next(); second.GetResources()[0].GetVersion() == first.GetResources()[0].GetVersion() {
			t.Error("the secret of before was sent again")
		}
		now.Store(End(refusal.New(refusal.PodGone, "it was deleted")))
		p.say(subscribe(NameDefault))
		wantReason(t, p.ended(), refusal.PodGone)
	})
}
