package client

import (
	"crypto/sha256"
	"slices"
	"sync"

	meshcav1 "github.com/meshca/meshca/api/meshca/v1"
	"github.com/meshca/meshca/api/refusal"
)

// maxIntermediates is how many are remembered: each replica of the CA has one at a time. The CA looks at 8 digests.
const maxIntermediates = 8

// intermediates remembers the CA's intermediates, the ones met last first, so that an answer need not repeat them. It
// vouches for none: whoever uses a chain verifies it.
type intermediates struct {
	mu   sync.Mutex
	held []intermediate
}

type intermediate struct {
	digest [sha256.Size]byte
	der    []byte
}

// digests names what is held.
func (m *intermediates) digests() [][]byte {
	m.mu.Lock()
	defer m.mu.Unlock()
	all := make([][]byte, len(m.held))
	for i, h := range m.held {
		all[i] = slices.Clone(h.digest[:])
	}
	return all
}

// complete gives each SVID of the answer its whole chain, from what came with the answer and what is held.
func (m *intermediates) complete(answer *meshcav1.IssueX509SVIDsResponse) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, der := range answer.GetIntermediates() {
		m.add(der)
	}
	for _, r := range answer.GetResults() {
		svid := r.GetSvid()
		for _, digest := range svid.GetIntermediates() {
			i := slices.IndexFunc(m.held, func(h intermediate) bool { return string(h.digest[:]) == string(digest) })
			if i < 0 {
				m.held = nil // the next call gets all of them anew
				return refusal.New(refusal.Internal, "the CA answered with a chain whose intermediate it did not send")
			}
			svid.Chain = append(svid.Chain, m.held[i].der)
		}
	}
	m.held = m.held[:min(len(m.held), maxIntermediates)]
	return nil
}

func (m *intermediates) add(der []byte) {
	one := intermediate{sha256.Sum256(der), der}
	if !slices.ContainsFunc(m.held, func(h intermediate) bool { return h.digest == one.digest }) {
		m.held = slices.Insert(m.held, 0, one)
	}
}
