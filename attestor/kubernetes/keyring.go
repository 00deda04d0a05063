package kubernetes

import (
	"context"
	"crypto"
	"errors"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"github.com/cenkalti/backoff/v5"
	"golang.org/x/sync/singleflight"

	"github.com/meshca/meshca/api/refusal"
)

const (
	// rereadPause is the least time between two readings of the source, however many unknown key ids come. It is also
	// the longest that a new key can be unknown to us while strangers make up key ids.
	rereadPause = 5 * time.Second
	// spreadTime is how long after a key first signs it may be missing at the source: its replicas learn of it one by
	// one, and clocks differ.
	spreadTime = time.Minute
)

// keyring holds a cluster's token keys, and reads them again: from time to time, and on an unknown key id.
type keyring struct {
	source  keySource
	issuer  string // configured; empty: the source says it
	timeout time.Duration
	now     func() time.Time
	log     *slog.Logger
	observe func(Call)

	set    atomic.Pointer[keySet] // never nil; the last good one, empty before the first
	last   lastError              // of the last reading
	flight singleflight.Group

	mu      sync.Mutex
	started time.Time // when the last reading began
}

func newKeyring(source keySource, s settings, now func() time.Time, log *slog.Logger, observe func(Call)) *keyring {
	k := &keyring{source: source, issuer: s.issuer, timeout: s.callTimeout, now: now, log: log, observe: observe}
	k.set.Store(&keySet{})
	k.last.set(refusal.New(refusal.KeysUnavailable, "the token keys were not read yet"))
	return k
}

func (k *keyring) current() *keySet { return k.set.Load() }

func (k *keyring) ready() error {
	if len(k.current().byID) > 0 {
		return nil // the last good ones still verify
	}
	return k.last.get()
}

// run reads the source at its period, and sooner after a failure, until ctx ends.
func (k *keyring) run(ctx context.Context) error {
	retry := &backoff.ExponentialBackOff{
		InitialInterval: time.Second, RandomizationFactor: 0.5, Multiplier: 2, MaxInterval: 30 * time.Second,
	}
	for {
		wait := k.source.period()
		if sooner, err := k.reread(ctx, 0); err != nil {
			wait = min(wait, retry.NextBackOff())
		} else if retry.Reset(); sooner > 0 { // it joined one who asked too soon
			wait = sooner
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(wait):
		}
	}
}

// find returns the key with that id, reading the source again when there is none. claimed is when the token says it was
// issued: a stranger's word, which decides only how the refusal reads.
func (k *keyring) find(ctx context.Context, id string, claimed time.Time) (crypto.PublicKey, *keySet, error) {
	set := k.current()
	if key, ok := set.byID[id]; ok {
		return key, set, nil
	}
	if id == "" {
		return nil, set, refusal.New(refusal.TokenKeyUnknown, "the token's header names no key").On("kid")
	}
	wait, err := k.reread(ctx, rereadPause)
	if ctx.Err() != nil {
		return nil, set, ctx.Err()
	}
	set = k.current()
	if key, ok := set.byID[id]; ok {
		return key, set, nil
	}
	switch {
	case err != nil:
		return nil, set, refusal.New(refusal.KeysUnavailable, "key %s is not known, and %s cannot be read: %s", quoted(id), k.source, plain(err)).After(rereadPause).On("kid")
	case len(set.byID) == 0:
		return nil, set, refusal.New(refusal.KeysUnavailable, "no keys were read from %s yet", k.source).After(rereadPause)
	case wait > 0 && set.readAt.Before(claimed.Add(spreadTime)):
		// Too soon after the last reading for another, and that one may have been too early for this token's key.
		return nil, set, refusal.New(refusal.KeysUnavailable, "key %s is not known yet; %s is read again in %v", quoted(id), k.source, wait.Round(time.Second)).After(wait).On("kid")
	}
	return nil, set, refusal.New(refusal.TokenKeyUnknown, "key %s is not among those of %s", quoted(id), k.source).On("kid")
}

// reread reads the source, once for all who ask meanwhile. It does nothing where the last reading began less than
// pause ago, and returns how long that lasts.
func (k *keyring) reread(ctx context.Context, pause time.Duration) (wait time.Duration, err error) {
	done := k.flight.DoChan("", func() (any, error) {
		k.mu.Lock()
		wait := k.started.Add(pause).Sub(k.now())
		if wait <= 0 {
			k.started = k.now()
		}
		k.mu.Unlock()
		if wait > 0 {
			return wait, k.last.get()
		}
		return time.Duration(0), k.fetch(context.WithoutCancel(ctx))
	})
	select {
	case <-ctx.Done():
		return 0, ctx.Err()
	case r := <-done:
		wait, _ = r.Val.(time.Duration)
		return wait, r.Err
	}
}

// fetch reads the source, and puts what it says into use when it is good. A bad answer leaves the last good one.
func (k *keyring) fetch(ctx context.Context) error {
	start := k.now()
	ctx, cancel := context.WithTimeout(ctx, k.timeout)
	defer cancel()
	raw, issuer, err := k.source.read(ctx)
	var set *keySet
	if err == nil {
		set, err = parseKeys(raw)
	}
	if err == nil {
		set.readAt, set.issuer = start, issuer
		if k.issuer != "" {
			set.issuer = k.issuer
		}
	}
	call := Call{What: "keys", Took: k.now().Sub(start)}
	if err != nil {
		call.Outcome = refusal.KeysUnavailable
		k.note(err)
	} else {
		k.use(set)
	}
	k.observe(call)
	return err
}

func (k *keyring) note(err error) {
	fault := refusal.New(refusal.KeysUnavailable, "reading the token keys from %s: %s", k.source, plain(err))
	if k.last.set(fault) {
		k.log.Warn("the token keys cannot be read; the last good ones stay in use", "source", k.source.String(), "error", plain(err))
	}
}

// plain is an error's text in one line; of a refusal without its reason, since another one is given.
func plain(err error) string {
	var inner *refusal.Error
	if errors.As(err, &inner) {
		return sentence(inner.Detail)
	}
	return sentence(err.Error())
}

func (k *keyring) use(set *keySet) {
	old := k.set.Swap(set)
	k.last.set(nil)
	if !sameKeys(old, set) {
		k.log.Info("token keys in use", "source", k.source.String(), "issuer", set.issuer, "keys", set.ids(), "skipped", set.skipped)
	}
}

func sameKeys(a, b *keySet) bool {
	if len(a.byID) != len(b.byID) || a.issuer != b.issuer {
		return false
	}
	for id, key := range a.byID {
		if other, ok := b.byID[id].(interface{ Equal(crypto.PublicKey) bool }); !ok || !other.Equal(key) {
			return false
		}
	}
	return true
}
