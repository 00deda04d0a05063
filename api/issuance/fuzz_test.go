package issuance_test

import (
	"context"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/meshca/meshca/api/issuance"
	meshcav1 "github.com/meshca/meshca/api/meshca/v1"
	"github.com/meshca/meshca/api/refusal"
	"github.com/meshca/meshca/test/world"
)

// asItIs sends and receives bytes where the server expects messages.
type asItIs struct{}

func (asItIs) Marshal(v any) ([]byte, error)      { return *v.(*[]byte), nil }
func (asItIs) Unmarshal(data []byte, v any) error { *v.(*[]byte) = data; return nil }
func (asItIs) Name() string                       { return "proto" }

// FuzzMessages sends bytes to each method, as an agent and as a stranger. The answer is a message or a refusal by name;
// never a fault of the server's, and never an SVID for a token that nobody issued.
func FuzzMessages(f *testing.F) {
	const many = 1 << 20
	d := newDoor(f, issuance.Limits{CallsPerSecond: many, BytesPerSecond: 1 << 30, OpenCalls: many, OpenCallsWithoutSVID: many})
	conns := map[bool]*grpc.ClientConn{true: d.connect(d.attest()), false: d.connect(nil)}
	methods := []string{
		meshcav1.IssuanceService_IssueX509SVIDs_FullMethodName,
		meshcav1.IssuanceService_AttestAgent_FullMethodName,
		meshcav1.IssuanceService_Sync_FullMethodName,
	}
	seed := func(method uint8, m proto.Message) {
		b, err := proto.Marshal(m)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(true, method, b)
		f.Add(false, method, b)
	}
	seed(0, &meshcav1.IssueX509SVIDsRequest{Cluster: world.Cluster, Requests: []*meshcav1.X509SVIDRequest{
		{Token: "a.b.c", Csr: []byte{0x30, 0}}, {Token: "e30.e30.e30", Ttl: &durationpb.Duration{Seconds: -1 << 62, Nanos: 1}}, nil,
	}})
	seed(1, &meshcav1.AttestAgentRequest{Cluster: world.Cluster, Token: "eyJhbGciOiJub25lIn0.e30.", Csr: []byte("x"), Version: "v\x00\n"})
	seed(2, &meshcav1.SyncRequest{Message: &meshcav1.SyncRequest_Hello{Hello: &meshcav1.SyncHello{Cluster: world.Cluster, Version: "v\x00"}}})
	seed(2, &meshcav1.SyncRequest{Message: &meshcav1.SyncRequest_Ack{Ack: &meshcav1.BundleAck{BundleSequence: 1<<64 - 1}}})
	f.Add(true, uint8(0), []byte{0xff, 0xff, 0xff})
	f.Fuzz(func(t *testing.T, asAgent bool, method uint8, message []byte) {
		name := methods[int(method)%len(methods)]
		ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
		defer cancel()
		stream, err := conns[asAgent].NewStream(ctx, &grpc.StreamDesc{ClientStreams: true, ServerStreams: true}, name, grpc.ForceCodec(asItIs{}))
		if err != nil {
			t.Fatal(err)
		}
		_ = stream.SendMsg(&message)
		_ = stream.CloseSend()
		var answer []byte
		err = stream.RecvMsg(&answer)
		unread := status.Code(err) == codes.Internal && proto.Unmarshal(message, empty(method%3)) != nil // grpc's own word
		switch {
		case unread:
		case err != nil:
			if e, ok := refusal.From(err); ok && e.Reason == refusal.Internal || !ok && name != methods[2] {
				t.Errorf("%s: %v", name, err)
			}
		case name == methods[0]:
			r := &meshcav1.IssueX509SVIDsResponse{}
			if err := proto.Unmarshal(answer, r); err != nil {
				t.Fatal(err)
			}
			for _, result := range r.GetResults() {
				if result.GetSvid() != nil || result.GetRefusal().GetReason() == string(refusal.Internal) {
					t.Errorf("answered with %v", result)
				}
			}
		case name == methods[1]:
			t.Error("an agent was attested by a token that nobody issued")
		}
	})
}

func empty(method uint8) proto.Message {
	return []proto.Message{&meshcav1.IssueX509SVIDsRequest{}, &meshcav1.AttestAgentRequest{}, &meshcav1.SyncRequest{}}[method]
}
