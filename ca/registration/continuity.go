package registration

import (
	"context"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/meshca/meshca/api/refusal"
	"github.com/meshca/meshca/ca"
)

// HistoryStore is what Continuity asks of the store; ca/store/storetest says what each method promises.
type HistoryStore interface {
	Mark() (ca.Mark, <-chan struct{})
	HasMark(ctx context.Context, m ca.Mark) (bool, error)
	History(ctx context.Context) (ca.History, error)
	PutLoss(ctx context.Context, l ca.Loss) error
	AcceptLoss(ctx context.Context, beyond uint64) error
}

// Bundles is the trust bundle, whose sequence can be raised: see ca.Trust.
type Bundles interface {
	RaiseSequence(ctx context.Context, beyond uint64) (uint64, error)
}

// Continuity knows whether the store is the one that agents have followed. Agents keep the sealed mark of the last state
// that they followed and show it when they come; one that the store does not know, under a seal of the store's own key,
// proves that the store is an old copy. Nobody can claim a state that there never was: a mark is believed for its seal,
// not for who shows it.
//
// While a loss is known and not accepted nothing is issued: what is denied, and which root is not to be trusted, may be
// what is lost.
type Continuity struct {
	store   HistoryStore
	bundles Bundles
	agents  *AgentBook
	key     []byte
	log     *slog.Logger

	changing sync.Mutex // orders changes of loss, in the store and here
	loss     atomic.Pointer[ca.Loss]
}

// OpenContinuity reads the store.
func OpenContinuity(ctx context.Context, store HistoryStore, bundles Bundles, agents *AgentBook, log *slog.Logger) (*Continuity, error) {
	h, err := store.History(ctx)
	if err != nil {
		return nil, err
	}
	if len(h.MarkKey) < sha256.Size {
		return nil, fmt.Errorf("registration: the store's key for marks has %d bytes", len(h.MarkKey))
	}
	c := &Continuity{store: store, bundles: bundles, agents: agents, key: h.MarkKey, log: log}
	c.loss.Store(h.Loss)
	agents.doubt(h.Floor)
	return c, nil
}

// A sealed mark is a version, the generation and the bundle's sequence (uint64, big-endian), the tag, and HMAC-SHA256 over
// all that behind sealContext.
const (
	sealVersion = 1
	sealContext = "meshca mark\x00"
	sealBody    = 1 + 8 + 8 + 16
	sealSize    = sealBody + sha256.Size
)

// Sealed is the mark of the state of now, for agents to keep, and a channel that closes when there is a newer one.
func (c *Continuity) Sealed() ([]byte, <-chan struct{}) {
	m, stale := c.store.Mark()
	b := make([]byte, 0, sealSize)
	b = append(b, sealVersion)
	b = binary.BigEndian.AppendUint64(b, m.Generation)
	b = binary.BigEndian.AppendUint64(b, m.Bundle)
	b = append(b, m.Tag[:]...)
	return c.seal(b), stale
}

func (c *Continuity) seal(body []byte) []byte {
	h := hmac.New(sha256.New, c.key)
	h.Write([]byte(sealContext))
	h.Write(body)
	return h.Sum(body)
}

// unseal returns the mark, and whether it is one of a store with our key.
func (c *Continuity) unseal(sealed []byte) (m ca.Mark, ok bool) {
	if len(sealed) != sealSize || sealed[0] != sealVersion {
		return m, false
	}
	body := append(make([]byte, 0, sealSize), sealed[:sealBody]...)
	if !hmac.Equal(c.seal(body), sealed) {
		return m, false
	}
	m.Generation, m.Bundle = binary.BigEndian.Uint64(body[1:]), binary.BigEndian.Uint64(body[9:])
	copy(m.Tag[:], body[17:])
	return m, true
}

// Witness looks at the mark that an agent shows, and returns CA_ROLLED_BACK when a loss is known, from this one or from
// another. proven says that the mark is one of ours, or of a lost past of ours.
func (c *Continuity) Witness(ctx context.Context, agent spiffeid.ID, sealed []byte) (proven bool, err error) {
	m, proven := c.unseal(sealed)
	if proven {
		has, err := c.store.HasMark(ctx, m)
		if err != nil {
			return true, refusal.New(refusal.StoreUnavailable, "the store's history could not be read: %w", err)
		}
		if !has {
			if err := c.lost(ctx, agent, m); err != nil {
				return true, err
			}
		}
	}
	return proven, c.Ready()
}

// lost notes a loss, or that it is larger than was known.
func (c *Continuity) lost(ctx context.Context, agent spiffeid.ID, m ca.Mark) error {
	c.changing.Lock()
	defer c.changing.Unlock()
	// It may have been accepted while we waited.
	if has, err := c.store.HasMark(ctx, m); err != nil || has {
		return err
	}
	next := ca.Loss{Mark: m, Agent: agent.String(), Since: time.Now()}
	if known := c.loss.Load(); known != nil {
		if m.Generation <= known.Mark.Generation && m.Bundle <= known.Mark.Bundle {
			return nil
		}
		next.Since = known.Since
		next.Mark.Generation, next.Mark.Bundle = max(m.Generation, known.Mark.Generation), max(m.Bundle, known.Mark.Bundle)
	}
	c.loss.Store(&next)
	c.log.Error("this CA's store is older than what an agent has followed: nothing is issued until an operator has looked", "agent", next.Agent,
		"seen_state", next.Mark.Generation, "seen_bundle_sequence", next.Mark.Bundle, "do", refusal.CARolledBack.Do())
	if err := c.store.PutLoss(ctx, next); err != nil {
		// It is known until this process ends, and whoever shows more of it has it written again.
		return refusal.New(refusal.StoreUnavailable, "that the store is an old one could not be noted: %w", err)
	}
	return nil
}

// Loss is what is known to be lost and was not accepted; nil: nothing.
func (c *Continuity) Loss() *ca.Loss { return c.loss.Load() }

// Ready returns CA_ROLLED_BACK while a loss is known.
func (c *Continuity) Ready() error {
	l := c.loss.Load()
	if l == nil {
		return nil
	}
	now, _ := c.store.Mark()
	return refusal.New(refusal.CARolledBack, "since %s: %s has followed state %d (trust bundle %d), and the store is at state %d (trust bundle %d)",
		l.Since.UTC().Format(time.RFC3339), l.Agent, l.Mark.Generation, l.Mark.Bundle, now.Generation, now.Bundle).After(15 * time.Second)
}

// maxSequence is what JSON numbers hold everywhere (RFC 8259 §6).
const maxSequence = 1<<53 - 1

// errNothingLost is for an Accept that has nothing to accept.
var errNothingLost = errors.New("no agent has shown that this CA's store is an old one: there is nothing to accept")

// Accept goes on from the store as it is. The bundle's sequence is raised beyond all that was seen, so that agents follow
// again, and at least beyond above, which an operator may name where nothing is proven; the sequence is returned.
func (c *Continuity) Accept(ctx context.Context, above uint64) (uint64, error) {
	c.changing.Lock()
	defer c.changing.Unlock()
	l := c.loss.Load()
	if l == nil && above == 0 {
		return 0, errNothingLost
	}
	if above > maxSequence-2*ca.AcceptedJump {
		return 0, refusal.New(refusal.RequestMalformed, "a sequence of %d is beyond what bundles can have", above).On("above")
	}
	newest, _ := c.store.Mark()
	beyond := max(above, newest.Bundle)
	generation := newest.Generation
	if l != nil {
		beyond, generation = max(beyond, l.Mark.Bundle), max(generation, l.Mark.Generation)
	}
	sequence, err := c.bundles.RaiseSequence(ctx, beyond+ca.AcceptedJump)
	if err != nil {
		return sequence, err
	}
	if err := c.store.AcceptLoss(ctx, generation+ca.AcceptedJump); err != nil {
		return sequence, refusal.New(refusal.StoreUnavailable, "the bundle's sequence is raised, but the loss stands: %w", err)
	}
	c.agents.doubt(sequence)
	c.loss.Store(nil)
	return sequence, nil
}
