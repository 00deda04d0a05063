package sds

// take works one request into the stream's state.
func (st *stream) take(r request) error {
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
	if err := st.subscribe(r, first, nonce); err != nil {
		return err
	}
	st.show()
	return nil
}

// meet reads what only a first request must carry.
func (st *stream) meet(r request) {
	st.deadline.Stop()
	if st.server.config.PlainValidation || asksPlain(r.node) {
		st.sub.validation = validatePlain
	}
	node := clip(r.node.GetId(), maxNode)
	st.server.streams.show(st, func(st *stream) { st.asked, st.shown.Node = true, node })
}

// subscribe brings the subscription to what the request says.
func (st *stream) subscribe(r request, first bool, nonce uint64) error {
	if st.sub.delta {
		// Changes count whatever the nonce says: they are not said again (xDS protocol, "Incremental xDS").
		if err := st.sub.change(r.subscribe, r.unsubscribe, first); err != nil {
			return err
		}
		st.owing = st.owing || first || len(r.subscribe)+len(r.unsubscribe) > 0
	} else {
		if !first && r.nonce != "" && nonce != st.last {
			// Stale: said before the peer saw the last answer. It says everything again with that one's nonce.
			return nil
		}
		changed, err := st.sub.restate(r.names)
		if err != nil {
			return err
		}
		st.owing = st.owing || first || changed
	}
	if first {
		st.sub.resume(r.initial)
		st.sub.resumeOne(r.version)
	}
	return nil
}

// ack counts for the last answer alone: the acknowledgement of an earlier one is followed by its own.
func (st *stream) ack(nonce uint64, r request) {
	if nonce != st.last || nonce == st.taken.acked {
		return
	}
	if !st.sub.delta && r.version != st.lastVersion {
		// A request that changes the subscription after a NACK has the nonce too, but not the version.
		return
	}
	st.taken.acked = nonce
	st.server.streams.show(st, func(st *stream) { st.shown.LastNack = "" })
	st.show()
	st.server.config.Observe.acked(st.shown)
}

func (st *stream) nack(nonce uint64, r request) {
	st.taken.refuse(nonce)
	n := Nack{Names: st.sub.sentIn(nonce, maxShown), Detail: nackDetail(r.refused.GetMessage())}
	st.server.streams.show(st, func(st *stream) {
		st.shown.Nacks++
		st.shown.LastNack = n.Detail
	})
	st.server.config.Observe.nacked(st.shown, n)
}

// show brings what the stream shows up to date.
func (st *stream) show() {
	sequence, ok := st.taken.sequence()
	unknown := st.sub.unknown(maxShown)
	st.server.streams.show(st, func(st *stream) {
		st.shown.Names, st.shown.Wildcard, st.shown.Unknown = st.sub.asked, st.sub.wildcard, unknown
		if ok {
			st.shown.Sequence = sequence
		}
	})
}
