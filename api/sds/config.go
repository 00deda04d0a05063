package sds

import (
	"cmp"
	"context"
	"errors"
	"math"
	"time"

	"github.com/meshca/meshca/rotation"
)

// Source gives what one peer is served. A rotation.Current[*Secrets] is one.
type Source interface {
	// Get returns the secrets of now, which may be nil while there is nothing yet (streams wait, peers' names are
	// neither known nor unknown), and a channel that closes when they are stale. It returns at once and is safe for
	// concurrent use. Secrets made by End end the streams.
	Secrets() (*Secrets, <-chan struct{})
}

// SourceFunc is a Source made of a function such as the Get of a rotation.Current[*Secrets].
type SourceFunc func() (*Secrets, <-chan struct{})

// Secrets calls the function.
func (f SourceFunc) Secrets() (*Secrets, <-chan struct{}) { return f() }

var _ Source = SourceFunc((*rotation.Current[*Secrets])(nil).Get)

// Config is what a Server is made of. Source is required.
type Config struct {
	// Source finds the source of the peer at the other end of ctx (credentials, socket), once for each stream or fetch
	// and before anything is read from it. Its error refuses the peer.
	Source func(ctx context.Context) (Source, error)
	// Peer names who is at the other end: that is what hooks and Streams show. Where it is nil that is the unix socket's path, or
	// the host of the peer's address.
	Peer func(ctx context.Context) string
	// Account is whom the limits of a peer are counted for. Nil: each peer has its own.
	Account func(ctx context.Context) Account
	// PlainValidation writes every validation context as a bare trusted_ca. A peer gets that for itself by node metadata
	// `disable_spiffe_cert_validation: true`.
	PlainValidation bool
	// SystemBundle is the path, in the proxy's file system, that `file-root:system` stands for; DefaultSystemBundle
	// where it is empty.
	SystemBundle string
	Limits       Limits
	Observe      Observe
}

// Account is one party, which may be several peers: together they cost what one may.
type Account struct {
	Name string
	// Streams takes the place of Limits.StreamsPerPeer; 0: it does not.
	Streams int
	// Limit is what people know that limit by; StreamsPerPeer where it is empty.
	Limit string
}

// Limits bound what a peer can cost. A zero field stands for its default. With the defaults a peer that does its worst
// holds some four megabytes: 32 streams with 64 KiB of requests that were not read yet, 30 KiB for the pieces in which they
// came and 20 KiB of their own, 512 KiB of names, and 64 KiB of answers that it does not read; each connection takes 24 KiB.
// Beside that, one that asks for much has its part of what all of them share: SpareNameBytes, LargeRequests and
// SpareAnswerBacklog.
type Limits struct {
	// Names is how many names a stream can be subscribed to at once; 10 000.
	Names int
	// NameBytes is what the names that a peer is subscribed to over all its streams can take, in bytes, with 128 for the
	// keeping of each, whatever others take; 512 KiB. A `file-` name counts three times its length.
	NameBytes int
	// SpareNameBytes is what the names of all peers can take beyond that, together; 8 MiB.
	SpareNameBytes int
	// RequestBytes is the size of a request that a peer can leave half sent on each of its streams, in bytes; 64 KiB, which hold
	// about a thousand names. It takes effect through ServerOptions.
	RequestBytes int
	// LargeRequestBytes is the size of a request at most, in bytes; 768 KiB, which hold ten thousand names. Of those larger than
	// RequestBytes there may be LargeRequests on their way at a time, of all peers together, 2: when more come, the connection
	// of the oldest is closed, or of the peer that has most of them. They take effect through ServerOptions.
	LargeRequestBytes, LargeRequests int
	// AnswerBytes is the size at which an answer is split, in bytes; 2 MiB, half of what a gRPC client accepts by default.
	AnswerBytes int
	// AnswerBacklog is what a peer can leave unread of answers over all its connections, in bytes, whatever others do; 64 KiB.
	// SpareAnswerBacklog is what all peers can leave unread beyond that, together; 8 MiB. An answer that has no room waits for
	// it. They take effect through ServerOptions.
	AnswerBacklog, SpareAnswerBacklog int
	// Streams is how many streams the server keeps at once; 20 000.
	Streams int
	// StreamsPerPeer is how many of them one peer may have, fetches among them; 32. An Envoy opens one for each secret of its
	// config. Through ServerOptions they count before anything of them is read.
	StreamsPerPeer int
	// StreamsPerConnection is how many a connection carries at once, further ones wait at the peer; 100. It takes
	// effect through ServerOptions.
	StreamsPerConnection uint32
	// RequestsPerSecond is how many requests of a peer are read, over all its streams and fetches; those beyond wait, 384
	// pieces of a stream at most: with more the connection is closed (through ServerOptions). 1000, in bursts of as many. A
	// request counts once more for each 250 names that it holds or has the server look at.
	RequestsPerSecond int
	// FirstRequest is how long a stream may say nothing at first, and any request take to arrive that has begun (through
	// ServerOptions); 10 s.
	FirstRequest time.Duration
	// Send is how long a peer may leave an answer unread; 30 s. Then the stream ends. Through ServerOptions a connection of which
	// nothing is read for twice as long is closed: answers can wait in it when their streams have ended.
	Send time.Duration
	// Called is what people know these limits by, by the name of the field: that is what refusals say. The field's own name
	// stands for one that is missing.
	Called map[string]string
}

func (l *Limits) called(field string) string { return cmp.Or(l.Called[field], field) }

// withDefaults is the limits with every field set.
func (l Limits) withDefaults() Limits {
	orDefault(&l.Names, 10_000)
	orDefault(&l.NameBytes, 512<<10)
	orDefault(&l.SpareNameBytes, 8<<20)
	orDefault(&l.RequestBytes, 64<<10)
	orDefault(&l.LargeRequestBytes, 768<<10)
	orDefault(&l.LargeRequests, 2)
	orDefault(&l.AnswerBytes, 2<<20)
	orDefault(&l.AnswerBacklog, 64<<10)
	orDefault(&l.SpareAnswerBacklog, 8<<20)
	orDefault(&l.Streams, 20_000)
	orDefault(&l.StreamsPerPeer, 32)
	orDefault(&l.StreamsPerConnection, 100)
	orDefault(&l.RequestsPerSecond, 1000)
	orDefault(&l.FirstRequest, 10*time.Second)
	orDefault(&l.Send, 30*time.Second)
	return l
}

func orDefault[N int | uint32 | time.Duration](field *N, value N) {
	if *field == 0 {
		*field = value
	}
}

func (l Limits) check() error {
	if l.Names < 0 || l.NameBytes < 0 || l.RequestBytes < 0 || l.SpareNameBytes < 0 ||
		l.LargeRequestBytes < 0 || l.LargeRequests < 0 || l.AnswerBytes < 0 || l.AnswerBacklog < 0 || l.SpareAnswerBacklog < 0 || l.Streams < 0 || l.StreamsPerPeer < 0 ||
		l.RequestsPerSecond < 0 || l.FirstRequest < 0 || l.Send < 0 {
		return errors.New("a limit of SDS is negative: leave it out for its default")
	}
	if l.AnswerBytes > math.MaxInt32 {
		return errors.New("AnswerBytes is more than a gRPC message can hold")
	}
	return nil
}
