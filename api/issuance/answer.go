package issuance

import (
	"crypto/sha256"
	"crypto/x509"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	meshcav1 "github.com/meshca/meshca/api/meshca/v1"
	"github.com/meshca/meshca/api/refusal"
	"github.com/meshca/meshca/ca"
)

// maxHeld is how many digests of a caller are looked at; a CA has one intermediate at a time, and another while it rotates.
const maxHeld = 8

// issued is what became of one item.
type issued struct {
	svid    ca.SVID
	refused error
}

// answer gathers a call's results. Items are put concurrently, each once; then message is taken.
type answer struct {
	results []issued
	held    [][]byte
}

func newAnswer(n int, held [][]byte) *answer {
	return &answer{results: make([]issued, n), held: held[:min(len(held), maxHeld)]}
}

func (a *answer) put(i int, r issued) { a.results[i] = r }

// message is the answer on the wire. All leaves of a call have the same intermediate, most callers have it already, and
// with its leaf it would be half of the answer: so it is sent once, and to whoever has not named it as held.
func (a *answer) message() *meshcav1.IssueX509SVIDsResponse {
	now := time.Now()
	m := &meshcav1.IssueX509SVIDsResponse{Results: make([]*meshcav1.X509SVIDResult, len(a.results)), ServerTime: timestamppb.New(now)}
	digests := make(map[*x509.Certificate][]byte, 2) // of the intermediates in this answer
	for i, r := range a.results {
		if r.refused != nil {
			m.Results[i] = refused(r.refused)
			continue
		}
		svid := encode(r.svid, now, 1)
		for _, c := range r.svid.Chain[1:] {
			digest, seen := digests[c]
			if !seen {
				digest = digestOf(c)
				digests[c] = digest
				if !a.holds(digest) {
					m.Intermediates = append(m.Intermediates, c.Raw)
				}
			}
			svid.Intermediates = append(svid.Intermediates, digest)
		}
		m.Results[i] = &meshcav1.X509SVIDResult{Result: &meshcav1.X509SVIDResult_Svid{Svid: svid}}
	}
	return m
}

func (a *answer) holds(digest []byte) bool {
	for _, h := range a.held {
		if string(h) == string(digest) {
			return true
		}
	}
	return false
}

func digestOf(c *x509.Certificate) []byte {
	sum := sha256.Sum256(c.Raw)
	return sum[:]
}

// encode is an SVID on the wire, with so many certificates of its chain.
func encode(svid ca.SVID, now time.Time, certificates int) *meshcav1.X509SVID {
	chain := make([][]byte, certificates)
	for i := range chain {
		chain[i] = svid.Chain[i].Raw
	}
	return &meshcav1.X509SVID{
		SpiffeId: svid.ID.String(), Chain: chain,
		Life: durationpb.New(svid.Life), Remaining: durationpb.New(svid.NotAfter.Sub(now)),
	}
}

func refused(err error) *meshcav1.X509SVIDResult {
	e, ok := refusal.From(err)
	switch {
	case ok:
	case refusal.Of(err) == refusal.CallEnded:
		e = refusal.New(refusal.CallEnded, "the call ended before the request was answered").After(time.Second)
	default: // its text is not the peer's business
		e, _ = refusal.From(refusal.Status(err))
	}
	r := &meshcav1.Refusal{Code: uint32(e.Reason.Code()), Reason: string(e.Reason), Message: e.Detail}
	if e.RetryAfter > 0 {
		r.RetryAfter = durationpb.New(e.RetryAfter)
	}
	return &meshcav1.X509SVIDResult{Result: &meshcav1.X509SVIDResult_Refusal{Refusal: r}}
}
