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
	"sync"
	"time"

	"github.com/meshca/meshca/ca/keyfile"
)

// tryAgain is how often a token that failed is tried, and how soon at the earliest.
const tryAgain = 3 * time.Second

var (
	errNoKey = errors.New("the token has no such key")
	errPIN   = errors.New("the token refuses the PIN")
	errWait  = errors.New("it failed a moment ago")
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
// next call; a library that serves several tokens is closed as a whole, because only that has it forget what it knew. It
// is safe for concurrent use.
type Modules struct {
	open func(u URI, pin string) (device, error)

	mu      sync.Mutex
	modules map[string]*module // by path
}

// module is one library.
type module struct {
	// use is held for reading by calls, and for writing to open and close. A call that hangs in the library hangs the rest.
	use      sync.RWMutex
	sessions map[string]*session // by token
	// wait is when tokens that could not be opened may be tried again, refused the PIN that each did not take.
	wait    map[string]time.Time
	refused map[string][sha256.Size]byte

	mu     sync.Mutex
	faults map[string]fault // by token, why each failed last
}

type fault struct {
	uri URI
	err error
}

// session is a token while it works.
type session struct {
	device device
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
			sessions: map[string]*session{}, wait: map[string]time.Time{}, refused: map[string][sha256.Size]byte{}, faults: map[string]fault{},
		}
	}
	return m.modules[path]
}

// call does something with a token.
func (m *Modules) call(u URI, do func(*session) error) error {
	mod := m.module(u.Module)
	err := mod.call(m.open, u, do)
	if err == nil || errors.Is(err, errNoKey) || errors.Is(err, fs.ErrExist) {
		mod.tell(u, nil)
		return err
	}
	if errors.Is(err, errWait) {
		return fmt.Errorf("%w: %w", errWait, mod.fault(u))
	}
	err = fmt.Errorf("PKCS #11 %s by %s: %w", u.TokenName(), u.Module, err)
	mod.tell(u, err)
	return err
}

func (mod *module) call(open func(URI, string) (device, error), u URI, do func(*session) error) error {
	for {
		mod.use.RLock()
		s := mod.sessions[u.TokenName()]
		if s == nil {
			mod.use.RUnlock()
			if err := mod.connect(open, u); err != nil {
				return err
			}
			continue
		}
		err := do(s)
		mod.use.RUnlock()
		if err != nil && !errors.Is(err, fs.ErrExist) {
			mod.drop(u, s)
		}
		return err
	}
}

// connect opens a token, unless it is open.
func (mod *module) connect(open func(URI, string) (device, error), u URI) error {
	mod.use.Lock()
	defer mod.use.Unlock()
	name := u.TokenName()
	if mod.sessions[name] != nil {
		return nil
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

// drop closes the module when this session of it has failed.
func (mod *module) drop(u URI, failed *session) {
	mod.use.Lock()
	defer mod.use.Unlock()
	if mod.sessions[u.TokenName()] == failed {
		mod.close()
	}
}

// close closes all sessions; mod.use is held for writing. What a library says when it is closed helps nobody.
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

func (mod *module) fault(u URI) error {
	mod.mu.Lock()
	defer mod.mu.Unlock()
	return mod.faults[u.TokenName()].err
}

func (m *Modules) fault(u URI) error { return m.module(u.Module).fault(u) }

// Probe opens a token, which says whether it is there and takes the PIN.
func (m *Modules) Probe(u URI) error { return m.call(u, func(*session) error { return nil }) }

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

// Close closes all tokens.
func (m *Modules) Close() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, mod := range m.modules {
		mod.use.Lock()
		mod.close()
		mod.use.Unlock()
	}
	return nil
}

// find returns the key, which is looked up once.
func (s *session) find(u URI) (crypto.Signer, error) {
	name := [2]string{u.Object, u.ID}
	s.mu.Lock()
	defer s.mu.Unlock()
	if k := s.found[name]; k != nil {
		return k, nil
	}
	k, err := s.device.find(u.Object, u.ID)
	if err != nil {
		return nil, err
	}
	s.found[name] = k
	return k, nil
}

func (s *session) forget(u URI) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.found, [2]string{u.Object, u.ID})
}
