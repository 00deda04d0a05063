package sds

import (
	"context"
	"io"
	"testing"
	"time"

	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"google.golang.org/protobuf/proto"

	"github.com/meshca/meshca/api/refusal"
	"github.com/meshca/meshca/rotation"
)

// script is a wire whose peer says what a fuzzer made up, one message after the other, and then closes its side.
type script struct {
	delta    bool
	messages [][]byte
	sent     []answer
}

func (s *script) receive() (*request, error) {
	if len(s.messages) == 0 {
		return nil, io.EOF
	}
	data := s.messages[0]
	s.messages = s.messages[1:]
	if s.delta {
		r := &discoveryv3.DeltaDiscoveryRequest{}
		if err := proto.Unmarshal(data, r); err != nil {
			return nil, io.EOF
		}
		return deltaRequestOf(r), nil
	}
	r := &discoveryv3.DiscoveryRequest{}
	if err := proto.Unmarshal(data, r); err != nil {
		return nil, io.EOF
	}
	return requestOf(r), nil
}

func (s *script) encode(a *answer) proto.Message {
	s.sent = append(s.sent, *a)
	return responseOf(a)
}

func (s *script) send(proto.Message) error { return nil }

// FuzzRequests gives a stream three messages in a row. It must end as the protocol or a refusal says, and never send
// what was not asked for.
func FuzzRequests(f *testing.F) {
	fixture()
	sotw := func(r *discoveryv3.DiscoveryRequest) []byte { b, _ := proto.Marshal(r); return b }
	delta := func(r *discoveryv3.DeltaDiscoveryRequest) []byte { b, _ := proto.Marshal(r); return b }
	f.Add(false, sotw(ask(NameDefault, "*")), sotw(ask()), sotw(nack(&discoveryv3.DiscoveryResponse{Nonce: "1"}, "v", NameAll)))
	f.Add(true, delta(subscribe(NameDefault, "x")), delta(subscribe("*")), delta(&discoveryv3.DeltaDiscoveryRequest{
		ResponseNonce: "2", ResourceNamesUnsubscribe: []string{"*", "x"},
		InitialResourceVersions: map[string]string{NameAll: "v"},
	}))
	f.Fuzz(func(t *testing.T, isDelta bool, one, two, three []byte) {
		source := rotation.NewCurrent(fixture().first)
		server, err := New(Config{
			Source: func(context.Context) (Source, error) { return SourceFunc(source.Get), nil },
			Limits: Limits{Names: 16, NameBytes: 1000, FirstRequest: time.Minute, Send: time.Minute},
		})
		if err != nil {
			t.Fatal(err)
		}
		p := SotW
		if isDelta {
			p = Delta
		}
		w := &script{delta: isDelta, messages: [][]byte{one, two, three}}
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		if err := server.serve(ctx, p, w); err != nil {
			switch refusal.Of(err) {
			case refusal.PeerLimit, refusal.RequestMalformed, refusal.TypeURLUnknown:
			default:
				t.Fatalf("the stream ended with %v", err)
			}
		}
		for _, a := range w.sent {
			if a.empty() || (len(a.removed) > 0 && !isDelta) {
				t.Fatalf("sent %+v", a)
			}
			for _, r := range a.resources {
				if r.GetVersion() == "" || r.GetResource().GetTypeUrl() != TypeURL {
					t.Fatalf("sent %s without a version or of another type", r.GetName())
				}
			}
		}
		if len(server.Streams()) != 0 {
			t.Fatal("the stream is still known")
		}
	})
}
