package sds

import "slices"

// taken follows which bundle the peer of a stream has acknowledged.
type taken struct {
	// context is the nonce of the last answer that held a validation context; acked is the newest that the peer took.
	context, acked uint64
	// refused: the peer refused the answer of context.
	refused bool
	// offered is the bundle sequence of the secrets that were last compared with what the peer asks for; settled tells
	// that nothing was left to send of them.
	offered uint64
	settled bool
	// pending are the answers that are neither taken nor refused yet, oldest first.
	pending []sent
}

// sent is an answer that went out.
type sent struct {
	nonce   uint64
	version string
	// names are a few of those in it.
	names []string
}

// maxPending is how many answers may be on their way for each to be known when it is acknowledged. Beyond, the oldest
// and the newest are.
const maxPending = 8

// sent notes an answer that goes out.
func (t *taken) sent(a *answer) {
	if len(t.pending) == maxPending {
		t.pending = slices.Delete(t.pending, 1, 2)
	}
	t.pending = append(t.pending, sent{a.nonce, a.version, a.names(maxShown)})
}

// wasSent reports whether the answer of that nonce called itself so.
func (t *taken) wasSent(nonce uint64, version string) bool {
	return slices.ContainsFunc(t.pending, func(s sent) bool { return s.nonce == nonce && s.version == version })
}

// names are a few of those in the answer of that nonce; none where it is settled already.
func (t *taken) names(nonce uint64) []string {
	for _, s := range t.pending {
		if s.nonce == nonce {
			return s.names
		}
	}
	return nil
}

// ack notes that the peer took an answer. The earlier ones are settled too: taken, or refused by then.
func (t *taken) ack(nonce uint64) {
	t.acked = nonce
	t.settle(func(s sent) bool { return s.nonce <= nonce })
}

func (t *taken) settle(done func(sent) bool) {
	if t.pending = slices.DeleteFunc(t.pending, done); len(t.pending) == 0 {
		t.pending = nil // a resting stream holds nothing
	}
}

// offer notes what was made of s: an answer, perhaps an empty one, and whether more is to come.
func (t *taken) offer(s *Secrets, a *answer, more bool) {
	t.settled = s != nil && !more
	if s != nil {
		t.offered = s.sequence
	}
	if a.context {
		t.context, t.refused = a.nonce, false
	}
}

// refuse notes a NACK.
func (t *taken) refuse(nonce uint64) {
	if nonce != 0 && nonce == t.context {
		t.refused = true
	}
	t.settle(func(s sent) bool { return s.nonce == nonce })
}

// sequence is the bundle sequence that the peer has taken; ok is false while it has yet to take what was offered.
func (t *taken) sequence() (n uint64, ok bool) {
	return t.offered, t.settled && !t.refused && t.acked >= t.context
}
