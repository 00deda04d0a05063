package admin

import (
	"context"
	"encoding/hex"
	"encoding/json"
	"math/big"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/protobuf/types/known/timestamppb"

	meshcav1 "github.com/meshca/meshca/api/meshca/v1"
	"github.com/meshca/meshca/api/refusal"
	"github.com/meshca/meshca/api/serial"
	"github.com/meshca/meshca/ca"
	"github.com/meshca/meshca/ca/registration"
)

const (
	// MaxEntries bounds one answer of ListSVIDs.
	MaxEntries = 10_000
	// DefaultEntries is what a request gets that names no limit.
	DefaultEntries = 1000
	// entriesPerMessage keeps a message far below gRPC's 4 MiB.
	entriesPerMessage = 500
)

// ListSVIDs streams the ledger's entries that fit, newest first. They are gathered before the first is sent: a peer that
// does not read holds up nothing.
func (s *Server) ListSVIDs(r *meshcav1.ListSVIDsRequest, stream grpc.ServerStreamingServer[meshcav1.ListSVIDsResponse]) error {
	limit := DefaultEntries
	switch {
	case r.GetLimit() > MaxEntries:
		return refusal.New(refusal.RequestMalformed, "a limit of %d is over the most, %d: narrow the filters", r.GetLimit(), MaxEntries).On("limit")
	case r.GetLimit() > 0:
		limit = int(r.GetLimit())
	}
	fits, err := s.newFilter(r)
	if err != nil {
		return err
	}
	var found []*meshcav1.LedgerEntry
	err = s.scan(stream.Context(), r.GetIncludeExpired(), func(e ca.LedgerEntry) bool {
		if entry := fits.match(e); entry != nil {
			found = append(found, entry)
		}
		return len(found) < limit
	})
	if err != nil {
		return err
	}
	for len(found) > 0 {
		n := min(len(found), entriesPerMessage)
		if err := stream.Send(&meshcav1.ListSVIDsResponse{Entries: found[:n]}); err != nil {
			return err
		}
		found = found[n:]
	}
	return nil
}

// scan calls fn for the entries whose SVIDs live, or for all, newest first until fn returns false.
func (s *Server) scan(ctx context.Context, all bool, fn func(ca.LedgerEntry) bool) error {
	look := func(e ca.LedgerEntry) (bool, error) {
		if err := ctx.Err(); err != nil {
			return false, err
		}
		return fn(e), nil
	}
	if all {
		return s.c.Ledger.ScanLedger(ctx, look)
	}
	return s.c.Ledger.ScanLiving(ctx, time.Now(), look)
}

// filter is a parsed ListSVIDsRequest.
type filter struct {
	r      *meshcav1.ListSVIDsRequest
	serial string
}

func (s *Server) newFilter(r *meshcav1.ListSVIDsRequest) (filter, error) {
	if r.GetSpiffeId() != "" {
		if _, err := s.parseID(r.GetSpiffeId()); err != nil {
			return filter{}, err
		}
	}
	number, err := serial.Parse(r.GetSerial())
	if err != nil {
		return filter{}, refusal.New(refusal.RequestMalformed, "%v", err).On("serial")
	}
	return filter{r, number}, nil
}

// match converts the entry if it fits, and returns nil if not. Evidence is decoded only where the rest fits.
func (f filter) match(e ca.LedgerEntry) *meshcav1.LedgerEntry {
	is := func(want, got string) bool { return want == "" || want == got }
	if !is(f.r.GetSpiffeId(), e.ID) || f.serial != "" && f.serial != serial.String(new(big.Int).SetBytes(e.Serial)) {
		return nil
	}
	evidence := decodeEvidence(e.Evidence)
	if !is(f.r.GetNamespace(), evidence.GetNamespace()) || !is(f.r.GetServiceAccount(), evidence.GetServiceAccount()) ||
		!is(f.r.GetPod(), evidence.GetPod()) || !is(f.r.GetNode(), evidence.GetNode()) {
		return nil
	}
	return &meshcav1.LedgerEntry{
		Index: e.Index, Serial: hex.EncodeToString(e.Serial), SpiffeId: e.ID, Profile: e.Profile,
		IssuedAt: timestamppb.New(e.IssuedAt), NotAfter: timestamppb.New(e.NotAfter),
		AuthorityKeyId: hex.EncodeToString(e.AuthorityKeyID), TbsDigest: hex.EncodeToString(e.TBSDigest),
		Evidence: evidence,
	}
}

// decodeEvidence never fails: an entry of another version is still an entry, and is shown with what could be read.
func decodeEvidence(b []byte) *meshcav1.Evidence {
	var e registration.LedgerEvidence
	if json.Unmarshal(b, &e) != nil {
		return &meshcav1.Evidence{}
	}
	return &meshcav1.Evidence{
		Method: e.Method, Door: e.Door, Cluster: e.Cluster, Namespace: e.Namespace, ServiceAccount: e.ServiceAccount,
		ServiceAccountUid: e.ServiceAccountUID, Pod: e.Pod, PodUid: e.PodUID, Node: e.Node, NodeUid: e.NodeUID,
		CredentialId: e.CredentialID, Agent: e.Agent, Rule: e.Rule, Way: e.Way,
	}
}
