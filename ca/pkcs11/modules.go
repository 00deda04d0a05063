// Package pkcs11 reaches keys in PKCS #11 tokens: HSMs, smart cards, SoftHSM.
//
// A module, which is a shared library, is loaded by builds with cgo alone: see Supported.
package pkcs11

import (
	"context"
	"crypto"
	"crypto/sha256"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sync/semaphore"

	"github.com/meshca/meshca/ca/keyfile"
)

// tryAgain is how often a token that failed is tried, and how soon at the earliest.
const tryAgain = 3 * time.Second

var (
	errNoKey = errors.New("the token has no such key")
	errPIN   = errors.New("the token refuses the PIN")
	errWait  = errors.New("it failed a moment ago")
	errFull  = errors.New("other calls are in the library and do not return")
)

// device is a token that was opened and logged in to. It is safe for concurrent use, close aside.
type device interface {
	// find returns the key with this label and id; either may be empty. It errs with errNoKey.
	find(object, id string) (crypto.Signer, error)
	// make makes a P-256 key that cannot be extracted.
	make(object, id string) (crypto.Signer, error)
	// destroy deletes the key, if it is there.
	destroy(object, id string) error
	close() error
}

// Modules are the PKCS #11 libraries in use, and the tokens behind them. Whatever fails is closed, and opened anew at the
// next call; a library that serves several tokens is closed as a whole, because only that has it forget what it knew. What
// does not return is left behind, within bounds: see call. It is safe for concurrent use.
type Modules struct {
	open func(u URI, pin string) (device, error)

	mu      sync.Mutex
	modules map[string]*module // by path
}

// module is one library.
type module struct {
	// slots are those of calls in the library. To open and close it takes all of them.
	slots *semaphore.Weighted
	// What who has a slot may read, and who has all may change:
	sessions map[string]*session // by token
	// wait is when tokens that could not be opened may be tried again, refused the PIN that each did not take.
	wait    map[string]time.Time
	refused map[string][sha256.Size]byte

	mu     sync.Mutex
	faults map[string]fault // by token, why each failed last
	under  map[*underway]struct{}
	asking bool // whether a token that is silent answers again
}

type fault struct {
	uri URI
	err error
}

// session is a token while it works.
type session struct {
	device device
	failed atomic.Bool // it is closed before the next call
	mu     sync.Mutex
	found  map[[2]string]crypto.Signer // by label and id
}

// New returns Modules that open what they are asked for.
func New() *Modules { return newModules(openDevice) }

func newModules(open func(u URI, pin string) (device, error)) *Modules {
	return &Modules{open: open, modules: map[string]*module{}}
}

func (m *Modules) module(path string) *module {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.modules[path] == nil {
		m.modules[path] = &module{
			slots: semaphore.NewWeighted(maxCalls), sessions: map[string]*session{}, wait: map[string]time.Time{},
			refused: map[string][sha256.Size]byte{}, faults: map[string]fault{}, under: map[*underway]struct{}{},
		}
	}
	return m.modules[path]
}

// told notes how a call with a token ended, and names the token in its error.
func (mod *module) told(u URI, err error) error {
	if err == nil || errors.Is(err, errNoKey) || errors.Is(err, fs.ErrExist) {
		mod.tell(u, nil)
		return err
	}
	if errors.Is(err, errWait) {
		return fmt.Errorf("%w: %w", errWait, mod.fault(u))
	}
	if errors.Is(err, errFull) { // which says nothing of this token
		return named(u, err)
	}
	err = named(u, err)
	mod.tell(u, err)
	return err
}

func named(u URI, err error) error {
	return fmt.Errorf("PKCS #11 %s by %s: %w", u.TokenName(), u.Module, err)
}

// with has a session of the token for as long as do takes.
func (mod *module) with(ctx context.Context, open func(URI, string) (device, error), u URI, do func(*session) error) error {
	for {
		if err := mod.slots.Acquire(ctx, 1); err != nil {
			return errFull
		}
		s := mod.sessions[u.TokenName()]
		if s == nil || s.failed.Load() {
			mod.slots.Release(1)
			if err := mod.connect(ctx, open, u); err != nil {
				return err
			}
			continue
		}
		leave := mod.enter(u)
		err := do(s)
		leave()
		mod.slots.Release(1)
		if err != nil && !errors.Is(err, fs.ErrExist) {
			mod.drop(s)
		}
		return err
	}
}

// connect opens a token, unless it is open. That needs all slots, so it fails at once while a call holds one whose answer
// was lost.
func (mod *module) connect(ctx context.Context, open func(URI, string) (device, error), u URI) error {
	if mod.stuck() {
		return errStuck
	}
	if err := mod.slots.Acquire(ctx, maxCalls); err != nil {
		return errFull
	}
	defer mod.slots.Release(maxCalls)
	name := u.TokenName()
	if s := mod.sessions[name]; s != nil {
		if !s.failed.Load() {
			return nil
		}
		mod.close()
	}
	if time.Until(mod.wait[name]) > 0 {
		return errWait
	}
	pin, err := keyfile.ReadSecret(u.PinSource)
	if err != nil {
		return fmt.Errorf("its PIN: %w", err)
	}
	defer clear(pin)
	sum := sha256.Sum256(pin)
	if mod.refused[name] == sum {
		return fmt.Errorf("%w in %s, which is not tried again: most tokens lock themselves after a few. Put the right one into the file", errPIN, u.PinSource)
	}
	defer mod.enter(u)()
	d, err := open(u, string(pin))
	if err != nil {
		if errors.Is(err, errPIN) {
			mod.refused[name] = sum
		}
		mod.wait[name] = time.Now().Add(tryAgain)
		// The library may have been finalized under the other tokens' sessions.
		mod.close()
		return err
	}
	delete(mod.wait, name)
	delete(mod.refused, name)
	mod.sessions[name] = &session{device: d, found: map[[2]string]crypto.Signer{}}
	return nil
}

// drop closes the module when this session of it has failed: now, or where other calls are in the library before the next
// one with this token.
func (mod *module) drop(failed *session) {
	failed.failed.Store(true)
	if !mod.slots.TryAcquire(maxCalls) {
		return
	}
	defer mod.slots.Release(maxCalls)
	for _, s := range mod.sessions {
		if s == failed {
			mod.close()
			return
		}
	}
}

// close closes all sessions; all slots are held. What a library says when it is closed helps nobody.
func (mod *module) close() {
	for name, s := range mod.sessions {
		_ = s.device.close()
		delete(mod.sessions, name)
	}
}

func (mod *module) tell(u URI, err error) {
	mod.mu.Lock()
	defer mod.mu.Unlock()
	if err == nil {
		delete(mod.faults, u.TokenName())
		return
	}
	mod.faults[u.TokenName()] = fault{u, err}
}

// fault is why a token does not work, as far as is known.
func (mod *module) fault(u URI) error {
	if err := mod.silent(u); err != nil {
		return named(u, err)
	}
	mod.mu.Lock()
	defer mod.mu.Unlock()
	return mod.faults[u.TokenName()].err
}

func (m *Modules) fault(u URI) error { return m.module(u.Module).fault(u) }

// Probe opens a token, which says whether it is there and takes the PIN.
func (m *Modules) Probe(u URI) error {
	_, err := call(context.Background(), m, u, func(*session) (struct{}, error) { return struct{}{}, nil })
	return err
}

// Run tries tokens that failed until they work again, until ctx ends: a CA that is not ready may be asked for nothing, and
// then no signature would show that its token is back.
func (m *Modules) Run(ctx context.Context) {
	tick := time.NewTicker(tryAgain)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
			m.inquire()
			for _, u := range m.failing() {
				_ = m.Probe(u) // the fault is told how it went
			}
		}
	}
}

func (m *Modules) failing() (all []URI) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, mod := range m.modules {
		mod.mu.Lock()
		for _, f := range mod.faults {
			all = append(all, f.uri)
		}
		mod.mu.Unlock()
	}
	return all
}

// Close closes all tokens. One that does not answer is left to the end of the process.
func (m *Modules) Close() error {
	m.mu.Lock()
	modules := maps.Clone(m.modules)
	m.mu.Unlock()
	var errs []error
	for path, mod := range modules {
		errs = append(errs, mod.end(path))
	}
	return errors.Join(errs...)
}

// end closes a module, if that does not take too long.
func (mod *module) end(path string) error {
	ctx, cancel := context.WithTimeout(context.Background(), closesWithin)
	defer cancel()
	ended := make(chan error, 1)
	go func() {
		err := mod.slots.Acquire(ctx, maxCalls)
		if err == nil {
			mod.close()
			mod.slots.Release(maxCalls)
		}
		ended <- err
	}()
	select {
	case err := <-ended:
		if err == nil {
			return nil
		}
	case <-ctx.Done():
	}
	return fmt.Errorf("PKCS #11: %s was not closed within %s: calls are in it that do not return", path, closesWithin)
}

// find returns the key, which is looked up once.
func (s *session) find(u URI) (crypto.Signer, error) {
	name := [2]string{u.Object, u.ID}
	s.mu.Lock()
	k := s.found[name]
	s.mu.Unlock()
	if k != nil {
		return k, nil
	}
	k, err := s.device.find(u.Object, u.ID) // who asks meanwhile asks, too, and waits for no other
	if err != nil {
		return nil, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.found[name] = k
	return k, nil
}

func (s *session) forget(u URI) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.found, [2]string{u.Object, u.ID})
}
