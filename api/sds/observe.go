package sds

import "time"

// Observe are hooks for logs and metrics. Each may be nil. They are called by the stream's own goroutine, so they hold
// that stream up and no other; they must not keep the slices.
type Observe struct {
	// Opened and Closed frame the life of a stream that was let in. err is nil where the peer ended it in order. cut: it was not
	// the peer who ended it, by its own hand or by closing its connection; err is the refusal where there was one.
	Opened func(Stream)
	Closed func(s Stream, cut bool, err error)
	// Entrusted: for the first time on this stream the peer is to get a validation context, or has it by an earlier stream.
	// The answer goes out when this has returned.
	Entrusted func(Stream)
	// Acked: the peer took an answer. Its bundle sequence is Stream.Sequence.
	Acked func(Stream)
	// Nacked: the peer refused an answer. It is not sent again; the next content is.
	Nacked func(Stream, Nack)
	// Refused: a call was not let in, or ended, for a limit, or a connection was closed. Unlike the others it may be called by
	// whoever reads the connection, or by a timer.
	Refused func(peer string, err error)
	// Unknown: names that were asked for and are not served, told once until they change.
	Unknown func(s Stream, names []string)
}

func (o *Observe) opened(s Stream) {
	if o.Opened != nil {
		o.Opened(s)
	}
}

func (o *Observe) closed(s Stream, cut bool, err error) {
	if o.Closed != nil {
		o.Closed(s, cut, err)
	}
}

func (o *Observe) entrusted(s Stream) {
	if o.Entrusted != nil {
		o.Entrusted(s)
	}
}

func (o *Observe) acked(s Stream) {
	if o.Acked != nil {
		o.Acked(s)
	}
}

func (o *Observe) nacked(s Stream, n Nack) {
	if o.Nacked != nil {
		o.Nacked(s, n)
	}
}

func (o *Observe) refused(peer string, err error) {
	if o.Refused != nil {
		o.Refused(peer, err)
	}
}

func (o *Observe) unknown(s Stream, names []string) {
	if o.Unknown != nil {
		o.Unknown(s, names)
	}
}

// Bounds of what is shown of a stream.
const (
	maxShown  = 8
	maxNode   = 256
	maxDetail = 1 << 10
)

// Protocol is the form of SDS that a stream speaks. It is a metric label.
type Protocol string

// The protocols.
const (
	SotW  Protocol = "sotw"
	Delta Protocol = "delta"
	Fetch Protocol = "fetch"
)

// Nack is a peer's refusal of an answer.
type Nack struct {
	// Names are the secrets that the answer held, at most eight of them.
	Names []string
	// Detail is what the peer said: one line, at most 1 KiB, without key material.
	Detail string
}

// Stream is what is known of an open stream.
type Stream struct {
	// Peer is Config.Peer's word; Node is the node id that the peer gives itself, at most 256 bytes.
	Peer, Node string
	Protocol   Protocol
	Opened     time.Time
	// Names is how many names it asks for; Wildcard tells that it asks for all.
	Names    int
	Wildcard bool
	// Waiting: there are no secrets for it yet.
	Waiting bool
	// Entrusted: it was sent a validation context of ours, or came with one.
	Entrusted bool
	// Sequence is the bundle sequence up to which the peer has taken everything that it asked for. A stream that asks
	// for no validation context has nothing to take, so it stands at the newest.
	Sequence uint64
	// Nacks counts refusals; LastNack is the last one, empty once a later answer was taken.
	Nacks      uint64
	LastNack   string
	LastNackAt time.Time
	// Unknown are names that it asks for and that are not served, at most eight of UnknownCount.
	Unknown      []string
	UnknownCount int
}
