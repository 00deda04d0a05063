package sds

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
}

// sequence is the bundle sequence that the peer has taken; ok is false while it has yet to take what was offered.
func (t *taken) sequence() (n uint64, ok bool) {
	return t.offered, t.settled && !t.refused && t.acked >= t.context
}
