package sds

import "time"

// take works one request into the stream's state.
func (st *stream) take(r *request) error {
	if err := checkType(r.typeURL); err != nil {
		return err
	}
	first := !st.asked
	if first {
		st.meet(r)
	}
	nonce := nonceOf(r.nonce, st.last)
	switch {
	case r.refused != nil:
		st.nack(nonce, r)
	case nonce != 0:
		st.ack(nonce, r)
	}
	err := st.subscribe(r, first, nonce)
	st.pay(len(r.names) + len(r.unsubscribe) + len(r.initial))
	return err
}

// namesPerRequest is how many names cost a peer as much of its pace as a request without any, about what they cost here.
const namesPerRequest = 250

// pay charges the peer's pace for so many names of a request, and for those that were looked at for it: who makes much
// of the server has fewer requests read.
func (st *stream) pay(names int) {
	names += st.sub.looked
	st.sub.looked = 0
	pace := st.load.pace
	if n := min(names/namesPerRequest, pace.Burst()); n > 0 {
		pace.ReserveN(time.Now(), n)
	}
}

// meet reads what only a first request must carry.
func (st *stream) meet(r *request) {
	st.clearDeadline()
	if st.server.config.PlainValidation || asksPlain(r.node) {
		st.sub.validation = validatePlain
	}
	node := clip(r.node.GetId(), maxNode)
	st.server.streams.show(st, func(st *stream) { st.asked, st.shown.Node = true, node })
}

// subscribe brings the subscription to what the request says.
func (st *stream) subscribe(r *request, first bool, nonce uint64) error {
	changed, err := first, error(nil)
	switch {
	case st.sub.delta:
		// Changes count whatever the nonce says: they are not said again (xDS protocol, "Incremental xDS").
		changed = changed || len(r.names)+len(r.unsubscribe) > 0
		err = st.sub.change(r.names, r.unsubscribe, first)
	case !first && r.nonce != "" && nonce != st.last:
		// Stale: said before the peer saw the last answer. It says everything again with that one's nonce.
	default:
		var restated bool
		restated, err = st.sub.restate(r.names)
		changed = changed || restated
	}
	if err != nil {
		return err
	}
	if first {
		st.sub.resume(r.initial)
		st.sub.resumeOne(r.version)
	}
	if changed {
		if err := st.server.streams.charge(st, st.sub.cost(), &st.server.config.Limits); err != nil {
			return err
		}
		st.owing = true
		st.show()
	}
	return nil
}

// ack counts for the answer that it names, also where later ones are on their way: they may be refused.
func (st *stream) ack(nonce uint64, r *request) {
	if nonce <= st.taken.acked {
		return
	}
	if !st.sub.delta && !st.taken.wasSent(nonce, r.version) {
		// A request that changes the subscription after a NACK has the nonce too, but not the version.
		return
	}
	st.taken.ack(nonce)
	if nonce == st.last {
		st.unread = 0
	}
	sequence, ok := st.taken.sequence()
	st.server.streams.show(st, func(st *stream) {
		st.shown.LastNack, st.shown.LastNackAt = "", time.Time{}
		if ok {
			st.shown.Sequence = sequence
		}
	})
	st.server.config.Observe.acked(st.shown)
}

func (st *stream) nack(nonce uint64, r *request) {
	names := st.taken.names(nonce)
	st.taken.refuse(nonce)
	if nonce == st.last {
		st.unread = 0
	}
	n := Nack{Names: names, Detail: nackDetail(r.refused.GetMessage())}
	st.server.streams.show(st, func(st *stream) {
		st.shown.Nacks++
		st.shown.LastNack, st.shown.LastNackAt = n.Detail, time.Now()
	})
	st.server.config.Observe.nacked(st.shown, n)
}

// show brings what the stream shows up to date.
func (st *stream) show() {
	sequence, ok := st.taken.sequence()
	unknown := st.sub.unknown(maxShown)
	st.server.streams.show(st, func(st *stream) {
		st.shown.Names, st.shown.Wildcard, st.shown.Unknown = st.sub.asked, st.sub.wildcard, unknown
		st.shown.UnknownCount = len(st.sub.absent)
		st.shown.Waiting = st.waiting
		if ok {
			st.shown.Sequence = sequence
		}
	})
}
