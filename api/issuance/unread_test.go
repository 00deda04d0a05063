package issuance_test

import (
	"strings"
	"testing"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/meshca/meshca/api/issuance"
	meshcav1 "github.com/meshca/meshca/api/meshca/v1"
	"github.com/meshca/meshca/api/refusal"
	"github.com/meshca/meshca/test/world"
)

// raw sends bytes that are no message.
type raw struct{}

func (raw) Marshal(v any) ([]byte, error) { return v.([]byte), nil }
func (raw) Unmarshal([]byte, any) error   { return nil }
func (raw) Name() string                  { return "proto" }

// What grpc refuses by itself leaves a line, as all else does.
func TestMessagesThatCannotBeReadLeaveALine(t *testing.T) {
	large := strings.Repeat("x", 4<<20)
	largeHello := &meshcav1.SyncRequest{Message: &meshcav1.SyncRequest_Hello{Hello: &meshcav1.SyncHello{Cluster: large}}}
	for name, tt := range map[string]struct {
		send func(*door) error
		code codes.Code
		want refusal.Reason
	}{
		"a large call": {func(d *door) error {
			_, err := d.dial(d.attest()).IssueX509SVIDs(t.Context(), &meshcav1.IssueX509SVIDsRequest{Cluster: large})
			return err
		}, codes.ResourceExhausted, refusal.BatchTooLarge},
		"a stranger's large call": {func(d *door) error {
			_, err := d.dial(nil).AttestAgent(t.Context(), &meshcav1.AttestAgentRequest{Token: large})
			return err
		}, codes.ResourceExhausted, refusal.BatchTooLarge},
		"no message": {func(d *door) error {
			return d.connect(nil).Invoke(t.Context(), meshcav1.IssuanceService_IssueX509SVIDs_FullMethodName, []byte{0xff}, nil, grpc.ForceCodec(raw{}))
		}, codes.Internal, refusal.RequestMalformed},
		"a large hello": {func(d *door) error {
			_, err := d.sync(d.attest(), largeHello).Recv()
			return err
		}, codes.ResourceExhausted, refusal.BatchTooLarge},
		"a large message on an open stream": {func(d *door) error {
			stream := d.sync(d.attest(), &meshcav1.SyncRequest{Message: &meshcav1.SyncRequest_Hello{Hello: &meshcav1.SyncHello{Cluster: world.Cluster}}})
			_, err := stream.Recv()
			if err == nil {
				err = stream.Send(largeHello)
			}
			for err == nil {
				_, err = stream.Recv()
			}
			return err
		}, codes.ResourceExhausted, refusal.BatchTooLarge},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			d := newDoor(t, issuance.Limits{})
			if err := tt.send(d); status.Code(err) != tt.code {
				t.Errorf("got %v, want %s", err, tt.code)
			}
			eventually(t, "an audit line", func() bool { return d.Audit.Last(t)["outcome"] == string(tt.want) })
		})
	}
}
