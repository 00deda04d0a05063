package kill

import (
	"crypto/x509"
	"encoding/hex"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"

	"github.com/meshca/meshca/ca"
)

// witness stands outside of the CA. It knows what the peers below the agent have acknowledged and are served, what was seen of
// the trust bundle, and what operators said. From that alone, and from what was issued, judge_test.go says what must not be.
// What the CA writes down of itself, such as its journal, it does not ask.
type witness struct {
	dir string
	// first is the root that signs at first.
	first string
	// life is how long SVIDs live, refresh how old a bundle file readers may use.
	life, refresh time.Duration

	mu sync.Mutex // guards what follows
	// wrong is the first that was seen and must not be, refused the handshakes that would have failed.
	wrong   error
	refused []handshake
	// excused: something was signed before a peer had its root, and that was not waited for.
	excused bool
	// stranded are the peers whose certificates somebody refuses since a tainted root has left.
	stranded map[string]stranding
	outages  outages
	roots    map[string]*x509.Certificate
	peers    map[string]*proxy // by account
	// issued are all certificates that peers were served, by serial.
	issued map[string]leaf
	// file is the bundle's file. It follows the store: after a kill, as soon as the next process writes it.
	file, store sight
	said        words
}

// proxy is what a peer has in use.
type proxy struct {
	leaf
	trusted map[string]bool
	// since is when it took each root into use for the first time, and then acknowledged it.
	since map[string]time.Time
	sight sight
}

// leaf is a certificate that was really issued.
type leaf struct {
	id, root, authority string // the root's ID, and the key ID of the intermediate
	notAfter            time.Time
}

// handshake is one that would have failed: of a server with a certificate under a root that the client does not trust.
type handshake struct {
	server, client, root string
	at                   time.Time
}

// stranding is the time in which a peer's certificate is refused, at most to the certificate's end.
type stranding struct {
	root       string
	since, end time.Time
}

// outages are the times in which the CA was away.
type outages struct {
	count int
	total time.Duration
	since time.Time // it is away; zero: it is there
}

// words are what operators said. Where it matters when, it is a moment before.
type words struct {
	// tainted are roots, and until when at least a tainted one is waited for: half of its bound.
	tainted map[string]time.Time
	// share bounds, in percent, for whom a root that comes may sign, until free.
	share int
	free  time.Time
	// barred are roots that were given up before they signed.
	barred map[string]bool
	// replaced are the key IDs of intermediates that had signed when they were ordered to be replaced; done is when that was
	// answered, and zero before.
	replaced map[string]bool
	done     time.Time
}

func newWitness(dir, first string, o settings) *witness {
	w := &witness{
		dir: dir, first: first, life: o.ttl, refresh: o.published, roots: map[string]*x509.Certificate{}, peers: map[string]*proxy{}, issued: map[string]leaf{},
		stranded: map[string]stranding{}, file: newSight(), store: newSight(), said: words{tainted: map[string]time.Time{}, barred: map[string]bool{}, replaced: map[string]bool{}},
	}
	for _, account := range accounts {
		w.peers[account] = &proxy{since: map[string]time.Time{}, sight: newSight()}
	}
	return w
}

// sight is what was seen of the trusted roots in one place.
type sight struct {
	sequence uint64
	// at is when it was looked at last.
	at time.Time
	// roots are all that were ever in it, with the last look before; without is when one of them was first seen to be gone.
	roots, without map[string]time.Time
	text           string
}

func newSight() sight { return sight{roots: map[string]time.Time{}, without: map[string]time.Time{}} }

// see takes in what is there at a look that began at this moment. What is gone does not come back.
func (s *sight) see(began time.Time, has []string) error {
	now := time.Now()
	for _, id := range has {
		if gone, left := s.without[id]; left {
			return fmt.Errorf("%w: the root %s came back, and was gone at %s", errRemoved, id, gone)
		}
		if _, known := s.roots[id]; !known {
			s.roots[id] = s.at
		}
	}
	s.at = began
	for id := range s.roots {
		if _, known := s.without[id]; !known && !slices.Contains(has, id) {
			s.without[id] = now
		}
	}
	return nil
}

// bundle takes in a trust bundle: its sequence never goes down.
func (s *sight) bundle(began time.Time, data []byte) error {
	if string(data) == s.text {
		s.at = began
		return nil
	}
	b, err := spiffebundle.Parse(domain, data)
	if err != nil {
		return err
	}
	sequence, _ := b.SequenceNumber()
	if sequence < s.sequence {
		return fmt.Errorf("the bundle's sequence went from %d to %d", s.sequence, sequence)
	}
	s.sequence, s.text = sequence, string(data)
	var has []string
	for _, r := range b.X509Authorities() {
		has = append(has, ca.RootID(r))
	}
	return s.see(began, has)
}

// look reads the bundle file, as readers do, and tells what is wrong so far.
func (w *witness) look() error {
	began := time.Now()
	data, err := os.ReadFile(filepath.Join(w.dir, "bundle.json"))
	if err != nil {
		return err
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	w.note(w.file.bundle(began, data))
	return w.wrong
}

func (w *witness) note(err error) {
	if w.wrong == nil {
		w.wrong = err
	}
}

// served is told of a certificate that a peer has from the agent, and takes into use.
func (w *witness) served(account string, chain []*x509.Certificate) {
	w.mu.Lock()
	defer w.mu.Unlock()
	l, err := w.leafOf(chain)
	if err != nil {
		w.note(err)
		return
	}
	now := time.Now()
	w.issued[chain[0].SerialNumber.Text(16)] = l
	w.peers[account].leaf = l
	w.note(w.replaced(l.authority, l.notAfter.Add(-w.life)))
	w.meet(now)
	w.strand(now)
}

// told is told of roots that a peer has from the agent. It reports whether they are others than those in use.
func (w *witness) told(account string, roots []*x509.Certificate) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	p := w.peers[account]
	ids := idsOf(roots)
	w.note(p.sight.see(time.Now(), ids))
	return p.trusted != nil && (len(p.trusted) != len(ids) || slices.ContainsFunc(ids, func(id string) bool { return !p.trusted[id] }))
}

// trusts is told of roots that a peer takes into use, a moment before it acknowledges them.
func (w *witness) trusts(account string, roots []*x509.Certificate) {
	w.mu.Lock()
	defer w.mu.Unlock()
	now := time.Now()
	p := w.peers[account]
	p.trusted = map[string]bool{}
	for _, r := range roots {
		id := ca.RootID(r)
		w.roots[id], p.trusted[id] = r, true
		if _, known := p.since[id]; !known {
			p.since[id] = now
		}
	}
	w.meet(now)
	w.strand(now)
}

// away is told that the CA was killed, there that it answers.
func (w *witness) away(now time.Time) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.outages.count, w.outages.since = w.outages.count+1, now
}

func (w *witness) there(now time.Time) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if o := &w.outages; !o.since.IsZero() {
		o.total, o.since = o.total+now.Sub(o.since), time.Time{}
	}
}

func idsOf(roots []*x509.Certificate) (all []string) {
	for _, r := range roots {
		all = append(all, ca.RootID(r))
	}
	return all
}

// leafOf finds out what a chain is by its signatures.
func (w *witness) leafOf(chain []*x509.Certificate) (leaf, error) {
	last := chain[len(chain)-1]
	if len(chain) != 2 || len(chain[0].URIs) != 1 || chain[0].CheckSignatureFrom(last) != nil {
		return leaf{}, errors.New("what is served is no chain of a leaf and an intermediate")
	}
	l := leaf{id: chain[0].URIs[0].String(), authority: hex.EncodeToString(last.SubjectKeyId), notAfter: chain[0].NotAfter}
	for range 2 {
		for id, r := range w.roots {
			if last.CheckSignatureFrom(r) == nil {
				l.root = id
				return l, nil
			}
		}
		if err := w.dig(); err != nil { // one that nobody was told of
			return leaf{}, err
		}
	}
	return leaf{}, fmt.Errorf("what is served to %s is signed under no root that there is", l.id)
}

// dig takes in all roots that the CA has on disk.
func (w *witness) dig() error {
	made, err := filepath.Glob(filepath.Join(w.dir, "state", "roots", "*.crt"))
	if err != nil {
		return err
	}
	for _, file := range append(made, filepath.Join(w.dir, "state", "root.crt")) {
		text, err := os.ReadFile(file)
		if err != nil {
			return err
		}
		found, err := certificates(text)
		if err != nil {
			return fmt.Errorf("%s: %w", file, err)
		}
		w.roots[ca.RootID(found[0])] = found[0]
	}
	return nil
}

// pem is the certificate of a root that the CA has on disk.
func (w *witness) pem(root string) ([]byte, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if err := w.dig(); err != nil {
		return nil, err
	}
	if w.roots[root] == nil {
		return nil, fmt.Errorf("there is no root %s on disk", root)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: w.roots[root].Raw}), nil
}

// equipped says what a peer still lacks; nil: all have certificates and roots in use.
func (w *witness) equipped() error {
	w.mu.Lock()
	defer w.mu.Unlock()
	for account, p := range w.peers {
		if p.root == "" || p.trusted == nil {
			return fmt.Errorf("the peer of %s has nothing in use yet", account)
		}
	}
	return nil
}

// renewed says which peer's certificate is not under this root, or was signed by an intermediate that was replaced since.
func (w *witness) renewed(root string) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	old := w.said.replaced
	for account, p := range w.peers {
		if p.root != root || old[p.authority] {
			return fmt.Errorf("%w: the peer of %s has a certificate under %s by %s, want one under %s that none of %v signed", errUnrenewed, account, p.root, p.authority, root, old)
		}
	}
	return nil
}

func serialOf(e ca.LedgerEntry) string { return new(big.Int).SetBytes(e.Serial).Text(16) }
