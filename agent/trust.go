package agent

import (
	"bytes"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"slices"
	"sync"

	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/meshca/meshca/rotation"
)

// trust is the bundle of the own trust domain: what the CA is verified against and what workloads are served. Between
// two bundles the higher sequence wins, wherever they come from.
//
// A file without a sequence, PEM or JSON, has no such rank: it counts when it is first seen and after it was changed,
// which is its owner's word, and never twice for the same content.
type trust struct {
	domain spiffeid.TrustDomain
	file   string // the first trust
	kept   string // where the bundle outlives a restart
	log    *slog.Logger

	// current is never nil; it is empty until a bundle was found. Bundles are not changed once they are in it.
	current *rotation.Current[*spiffebundle.Bundle]

	mu      sync.Mutex
	mark    []byte // the CA's name for the last state that was followed
	taken   string // digest of the file without a sequence that was taken last, hex; empty where the last one had a sequence
	fileErr error  // why the file could not be taken when it was read last
	foreign bool   // the file had a root then that is not held, and was left alone: it was not newer
	fileHas uint64 // its sequence
	keptErr error  // why the bundle is not on disk
	acked   uint64 // the sequence that all below were last known to have
}

// keptTrust is the file that trust keeps.
type keptTrust struct {
	Bundle json.RawMessage `json:"bundle"`
	// Taken is the digest of the file without a sequence that was taken last.
	Taken string `json:"taken,omitempty"`
	// Mark is the CA's name for the last state that was followed.
	Mark []byte `json:"mark,omitempty"`
	// Acked is the sequence that all below the agent were last known to have.
	Acked uint64 `json:"acked,omitempty"`
}

var _ x509bundle.Source = (*trust)(nil)

func newTrust(domain spiffeid.TrustDomain, file, kept string, log *slog.Logger) *trust {
	return &trust{domain: domain, file: file, kept: kept, log: log, current: rotation.NewCurrent(spiffebundle.New(domain))}
}

// GetX509BundleForTrustDomain gives the roots of now.
func (t *trust) GetX509BundleForTrustDomain(td spiffeid.TrustDomain) (*x509bundle.Bundle, error) {
	b := t.current.Value()
	if len(b.X509Authorities()) == 0 {
		return nil, fmt.Errorf("no trust bundle is held: %s must bring it", t.file)
	}
	return b.GetX509BundleForTrustDomain(td)
}

// sequence is that of the bundle held; 0 where it has none.
func (t *trust) sequence() uint64 {
	n, _ := t.current.Value().SequenceNumber()
	return n
}

// load takes what an earlier run kept, and the file.
func (t *trust) load() {
	if err := t.restore(); err != nil && !errors.Is(err, fs.ErrNotExist) {
		t.log.Warn("the kept trust bundle cannot be used, the bundle file has to do", "file", t.kept, "error", err)
	}
	if err := t.readFile(); err != nil {
		t.log.Warn("the bundle file cannot be used; it is read again at each handshake that fails", "file", t.file, "error", err)
	}
}

func (t *trust) restore() error {
	data, err := readFile(t.kept, maxBundleBytes)
	if err != nil {
		return err
	}
	var k keptTrust
	if err := json.Unmarshal(data, &k); err != nil {
		return err
	}
	b, err := parseBundle(t.domain, k.Bundle)
	if err != nil {
		return err
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	sequence, _ := b.SequenceNumber()
	t.taken, t.mark, t.acked = k.Taken, k.Mark, min(k.Acked, sequence)
	t.current.Set(b)
	return nil
}

// readFile reads the bundle file and takes what it holds if it is newer than what is held.
func (t *trust) readFile() error {
	b, digest, err := readBundleFile(t.domain, t.file)
	t.mu.Lock()
	defer t.mu.Unlock()
	t.fileErr, t.foreign = err, false
	if err != nil {
		return err
	}
	n, numbered := b.SequenceNumber()
	switch {
	case !numbered && digest == t.taken:
		return nil // what is held came after it
	case !numbered:
		t.taken = digest
	case !newer(b, t.current.Value()):
		t.fileHas, t.foreign = n, slices.ContainsFunc(b.X509Authorities(), func(root *x509.Certificate) bool { return !t.current.Value().HasX509Authority(root) })
		return nil
	default:
		t.taken = ""
	}
	t.set(b, "bundle file")
	return nil
}

// maxMark bounds what is kept for the CA, in bytes.
const maxMark = 256

// offer takes a bundle that came over a verified connection, if it is newer than what is held, and the mark that came with
// it. Beside a bundle that is older than the one held, the mark is worth nothing, and the one held may prove to the CA that
// it has lost something.
func (t *trust) offer(encoded, mark []byte) error {
	b, err := parseBundle(t.domain, encoded)
	if err != nil {
		return fmt.Errorf("the CA's bundle: %w", err)
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	n, _ := b.SequenceNumber()
	marked := len(mark) > 0 && len(mark) <= maxMark && !bytes.Equal(mark, t.mark) && n >= t.sequence()
	if marked {
		t.mark = mark
	}
	switch {
	case newer(b, t.current.Value()):
		t.set(b, "CA")
	case marked:
		t.keep(t.current.Value())
	}
	return nil
}

// witnessed is the CA's name for the last state that was followed.
func (t *trust) witnessed() []byte {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.mark
}

// set puts a bundle on disk and then in use; t.mu is held.
func (t *trust) set(b *spiffebundle.Bundle, from string) {
	t.keep(b)
	sequence, _ := b.SequenceNumber()
	t.log.Info("new trust bundle", "from", from, "sequence", sequence, "roots", len(b.X509Authorities()))
	t.current.Set(b)
}

// keep puts a bundle on disk; t.mu is held.
func (t *trust) keep(b *spiffebundle.Bundle) {
	if t.keptErr = t.write(b); t.keptErr != nil {
		t.log.Error("the trust bundle cannot be kept; it is in use, but a restart will not know it", "file", t.kept, "error", t.keptErr)
	}
}

func (t *trust) write(b *spiffebundle.Bundle) error {
	encoded, err := b.Marshal()
	if err != nil {
		return err
	}
	data, err := json.Marshal(keptTrust{Bundle: encoded, Taken: t.taken, Mark: t.mark, Acked: t.acked})
	if err != nil {
		return err
	}
	return replaceFile(t.kept, data)
}

// confirm keeps that all below have the bundle of this sequence.
func (t *trust) confirm(sequence uint64) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if sequence <= t.acked {
		return
	}
	t.acked = sequence
	if err := t.write(t.current.Value()); err != nil { // a restart waits then, which costs time and nothing else
		t.log.Warn("the acknowledgement of a trust bundle cannot be kept", "file", t.kept, "sequence", sequence, "error", err)
	}
}

// confirmed is the sequence that all below are known to have, from before a restart too.
func (t *trust) confirmed() uint64 {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.acked
}

// ensureKept reports whether the bundle in use is on disk; it is written again where that failed before.
func (t *trust) ensureKept() bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.keptErr != nil {
		t.keptErr = t.write(t.current.Value())
	}
	return t.keptErr == nil
}

// faults are why the file and the kept copy are not as they should be.
func (t *trust) faults() (file, kept error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.fileErr, t.keptErr
}

// outranked reports whether the file, when it was read last, had a root that is not held and was not newer; n is its sequence. It
// is how an old file looks, and how that of a CA does whose first sequence is lower than the last one of the CA before.
func (t *trust) outranked() (n uint64, is bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.fileHas, t.foreign
}

// newer reports whether b is to replace held. A bundle with a sequence replaces one without.
func newer(b, held *spiffebundle.Bundle) bool {
	if len(held.X509Authorities()) == 0 {
		return true
	}
	n, numbered := b.SequenceNumber()
	h, heldNumbered := held.SequenceNumber()
	return numbered && (!heldNumbered || n > h)
}

// parseBundle reads SPIFFE JSON and wants at least one X.509 root in it.
func parseBundle(td spiffeid.TrustDomain, encoded []byte) (*spiffebundle.Bundle, error) {
	b, err := spiffebundle.Parse(td, encoded)
	if err != nil {
		return nil, err
	}
	if len(b.X509Authorities()) == 0 {
		return nil, errors.New("it holds no X.509 root")
	}
	return b, nil
}

// readBundleFile reads SPIFFE JSON, or PEM. It also gives the digest of what it read, in hex.
func readBundleFile(td spiffeid.TrustDomain, path string) (b *spiffebundle.Bundle, digest string, err error) {
	data, err := readFile(path, maxBundleBytes)
	if err != nil {
		return nil, "", err
	}
	if data = bytes.TrimSpace(data); len(data) > 0 && data[0] == '{' {
		b, err = parseBundle(td, data)
	} else {
		b, err = parsePEM(td, data)
	}
	if err != nil {
		return nil, "", fmt.Errorf("%s: %w", path, err)
	}
	sum := sha256.Sum256(data)
	return b, hex.EncodeToString(sum[:]), nil
}

// parsePEM reads certificates and wants at least one.
func parsePEM(td spiffeid.TrustDomain, data []byte) (*spiffebundle.Bundle, error) {
	roots, err := x509bundle.Parse(td, data)
	if err != nil {
		return nil, err
	}
	if len(roots.X509Authorities()) == 0 {
		return nil, errors.New("it holds neither a SPIFFE bundle nor a PEM certificate")
	}
	return spiffebundle.FromX509Bundle(roots), nil
}

// fileMode is the mode of the bundle file, for checks.
func (t *trust) fileMode() (fs.FileMode, error) {
	info, err := os.Stat(t.file)
	if err != nil {
		return 0, err
	}
	return info.Mode(), nil
}
