package pkcs11

import (
	"context"
	"errors"
	"fmt"
	"time"
)

const (
	// maxCalls bounds the calls in one library at a time. One that hangs keeps its place, and a thread, until it returns:
	// PKCS #11 has no way to call it off, and a library must not be closed under it (C_Finalize, PKCS #11 §5.4).
	maxCalls = 64
	// longest is how long anybody waits for a token who sets no earlier end: some take seconds to open, or to make a key.
	longest = 30 * time.Second
	// tooLong is how long a call may be in a library before its token counts as silent.
	tooLong = 10 * time.Second
	// closesWithin bounds the end of the process.
	closesWithin = 5 * time.Second
)

// errSilent is for a token that has not answered for too long: nobody else waits for it.
var errSilent = errors.New("it does not answer")

// errStuck is for a library that would have to be closed and cannot be.
var errStuck = errors.New("its library must be opened anew, and cannot be: a call is in it whose answer was lost, and which nothing can call off. " +
	"If it does not return, restart the CA")

// underway is a call in a library.
type underway struct {
	uri   URI
	began time.Time
	// lost: the token has answered others since, so that this one says nothing of it.
	lost bool
}

// enter counts a call that goes into the library, until the returned function is called.
func (mod *module) enter(u URI) (leave func()) {
	c := &underway{uri: u, began: time.Now()}
	mod.mu.Lock()
	defer mod.mu.Unlock()
	mod.under[c] = struct{}{}
	return func() {
		mod.mu.Lock()
		defer mod.mu.Unlock()
		delete(mod.under, c)
	}
}

// silent says since when a token does not answer; nil when it does, as far as is known.
func (mod *module) silent(u URI) error {
	mod.mu.Lock()
	defer mod.mu.Unlock()
	var took time.Duration
	for c := range mod.under {
		if c.uri.TokenName() == u.TokenName() && !c.lost {
			took = max(took, time.Since(c.began))
		}
	}
	if took < tooLong {
		return nil
	}
	return fmt.Errorf("%w: a call has been under way for %s, and nothing can call it off. It goes on by itself when the token answers; if it does "+
		"not, although the token works, restart the CA", errSilent, took.Round(time.Second))
}

// stuck reports whether a call is in the library that returns no more, as far as is known: nobody may wait for it.
func (mod *module) stuck() bool {
	mod.mu.Lock()
	defer mod.mu.Unlock()
	for c := range mod.under {
		if c.lost {
			return true
		}
	}
	return false
}

// call does something with a token. It returns when that is done, at the end of ctx, or when the token has kept it waiting for
// too long, whatever becomes of the call then; what it would have brought is dropped. Nobody waits for a token that is silent.
func call[T any](ctx context.Context, m *Modules, u URI, do func(*session) (T, error)) (T, error) {
	var none T
	mod := m.module(u.Module)
	if err := mod.silent(u); err != nil {
		return none, named(u, err)
	}
	ctx, cancel := context.WithTimeout(ctx, longest)
	defer cancel()
	type answer struct {
		value T
		err   error
	}
	answered := make(chan answer, 1)
	began := time.Now()
	go func() {
		var a answer
		err := mod.with(ctx, m.open, u, func(s *session) (err error) {
			a.value, err = do(s)
			return err
		})
		a.err = mod.told(u, err)
		answered <- a
	}()
	select {
	case a := <-answered:
		return a.value, a.err
	case <-ctx.Done():
		if errors.Is(ctx.Err(), context.Canceled) { // nobody wants the answer any more
			return none, ctx.Err()
		}
		return none, named(u, fmt.Errorf("%w: it was waited for for %s", errSilent, time.Since(began).Round(time.Millisecond)))
	}
}

// inquire asks silent tokens whether they answer again, one question at a time in each library. One that does is used again:
// a single answer that was lost must not keep the CA from signing for ever.
func (m *Modules) inquire() {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, mod := range m.modules {
		for _, u := range mod.unanswered() {
			if mod.silent(u) != nil && mod.ask() {
				go mod.inquire(u)
			}
		}
	}
}

// unanswered are what calls that are under way for too long ask of.
func (mod *module) unanswered() (all []URI) {
	mod.mu.Lock()
	defer mod.mu.Unlock()
	for c := range mod.under {
		if !c.lost && time.Since(c.began) >= tooLong {
			all = append(all, c.uri)
		}
	}
	return all
}

// ask takes the turn to inquire.
func (mod *module) ask() bool {
	mod.mu.Lock()
	defer mod.mu.Unlock()
	if mod.asking {
		return false
	}
	mod.asking = true
	return true
}

func (mod *module) inquire(u URI) {
	began := time.Now()
	answers := false
	if mod.slots.TryAcquire(1) {
		if s := mod.sessions[u.TokenName()]; s != nil {
			_, err := s.device.find(u.Object, u.ID)
			answers = err == nil || errors.Is(err, errNoKey)
		}
		mod.slots.Release(1)
	}
	mod.mu.Lock()
	defer mod.mu.Unlock()
	mod.asking = false
	for c := range mod.under {
		if answers && c.uri.TokenName() == u.TokenName() && c.began.Before(began) {
			c.lost = true
		}
	}
}
