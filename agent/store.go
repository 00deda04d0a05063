package agent

import (
	"crypto"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"

	"github.com/meshca/meshca/rotation"
)

const (
	maxKeptBytes = 256 << 10
	keptVersion  = 1
	keptSuffix   = ".json"
)

// store keeps SVIDs and their keys across a restart of the agent, each in a file of its own that only the agent can
// read. The directory belongs on a tmpfs: keys have no business on a disk, and a reboot ends what they are for.
type store struct {
	dir string
	now func() instant
}

// kept is one file of the store. It holds a private key and is never printed.
type kept struct {
	Version int `json:"version"`
	// Socket and TokenFile are those of the workload, empty for the agent's own. An SVID is used again only for the very
	// workload that it was issued to.
	Socket    string `json:"socket,omitempty"`
	TokenFile string `json:"tokenFile,omitempty"`
	ID        string `json:"id"`
	// Bearer is whose the token was; files of earlier versions have none.
	Bearer Bearer   `json:"bearer"`
	Chain  [][]byte `json:"chain"`
	Key    []byte   `json:"key"` // PKCS #8; empty where nothing but the bearer is kept
	// Life is T, and Left what was left of it when this came: Since after the start of the boot that Boot names. That is
	// how it is run down while the machine does not boot again. Files of earlier versions have neither.
	Life  time.Duration `json:"life"`
	Left  time.Duration `json:"left,omitempty"`
	Boot  string        `json:"boot,omitempty"`
	Since time.Duration `json:"since,omitempty"`
	// Skew is the CA's clock minus ours, as it was when this came. Across a boot only the wall clock counts on.
	Skew time.Duration `json:"skew"`
}

// prepare makes the directory, or makes an existing one private.
func (s *store) prepare() error {
	if err := privateDir(s.dir); err != nil {
		return fmt.Errorf("the directory for keys: %w", err)
	}
	return nil
}

// nameOf is the file name for a workload.
func nameOf(w Workload) string {
	sum := sha256.Sum256([]byte(w.Socket))
	return "svid-" + hex.EncodeToString(sum[:16])
}

const selfName = "agent"

func (s *store) path(name string) string { return filepath.Join(s.dir, name+keptSuffix) }

// save is durable when it returns nil.
func (s *store) save(name string, w Workload, h *held, skew time.Duration) error {
	key, err := x509.MarshalPKCS8PrivateKey(h.svid.PrivateKey)
	if err != nil {
		return err
	}
	data, err := json.Marshal(kept{
		Version: keptVersion, Socket: w.Socket, TokenFile: w.TokenFile, ID: h.svid.ID.String(), Bearer: h.bearer, Chain: h.chain(), Key: key,
		Life: h.term.Life, Left: h.term.Left, Boot: h.received.boot, Since: h.received.since, Skew: skew,
	})
	if err != nil {
		return err
	}
	return replaceFile(s.path(name), data)
}

// disown forgets the SVID, and keeps whose it was: proxies may still have it.
func (s *store) disown(name string, w Workload, whose Bearer) error {
	data, err := json.Marshal(kept{Version: keptVersion, Socket: w.Socket, TokenFile: w.TokenFile, Bearer: whose})
	if err != nil {
		return err
	}
	return replaceFile(s.path(name), data)
}

// load returns what was kept for the workload, nil when that is nothing or has ended, and whose it is or was.
func (s *store) load(name string, w Workload, td spiffeid.TrustDomain) (h *held, whose Bearer, err error) {
	path := s.path(name)
	info, err := os.Lstat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, Bearer{}, nil
	}
	if err != nil {
		return nil, Bearer{}, err
	}
	if info.Mode().Perm()&0o077 != 0 || ownerOf(info) != os.Geteuid() {
		return nil, Bearer{}, fmt.Errorf("%s could be read by others (mode %v, uid %d): it is not used", path, info.Mode(), ownerOf(info))
	}
	data, err := readFile(path, maxKeptBytes)
	if err != nil {
		return nil, Bearer{}, err
	}
	var k kept
	if err := json.Unmarshal(data, &k); err != nil {
		return nil, Bearer{}, fmt.Errorf("%s is damaged: %w", path, err)
	}
	switch {
	case k.Version != keptVersion:
		return nil, Bearer{}, fmt.Errorf("%s has version %d, this agent knows %d", path, k.Version, keptVersion)
	case k.Socket != w.Socket || k.TokenFile != w.TokenFile:
		return nil, Bearer{}, nil // another workload's by now
	}
	if len(k.Key) == 0 {
		return nil, k.Bearer, nil
	}
	now := s.now()
	h, err = k.held(td, now)
	if err != nil {
		return nil, Bearer{}, fmt.Errorf("%s: %w", path, err)
	}
	if h.ended(now) {
		return nil, k.Bearer, nil
	}
	return h, k.Bearer, nil
}

func (k *kept) held(td spiffeid.TrustDomain, now instant) (*held, error) {
	id, err := spiffeid.FromString(k.ID)
	if err != nil {
		return nil, err
	}
	if !id.MemberOf(td) {
		return nil, fmt.Errorf("%s is not of trust domain %s", id, td)
	}
	chain, err := parseChain(k.Chain)
	if err != nil {
		return nil, err
	}
	parsed, err := x509.ParsePKCS8PrivateKey(k.Key)
	if err != nil {
		return nil, errors.New("its key is damaged")
	}
	key, ok := parsed.(crypto.Signer)
	if !ok {
		return nil, errors.New("its key cannot sign")
	}
	svid := &x509svid.SVID{ID: id, Certificates: chain, PrivateKey: key}
	if err := matches(svid); err != nil {
		return nil, fmt.Errorf("its certificate %w", err)
	}
	if k.Life <= 0 {
		return nil, errors.New("its life is missing")
	}
	term := rotation.Term{Life: k.Life, Left: k.left(chain[0].NotAfter, now), Received: now.wall}
	return &held{svid: svid, term: term, received: now, bearer: k.Bearer}, nil
}

// left is what is left of the life: a clock that was set since must neither end it nor lengthen it.
func (k *kept) left(notAfter time.Time, now instant) time.Duration {
	most := k.Life
	if k.Left > 0 {
		most = min(most, k.Left)
	}
	if lived, ok := now.after(instant{boot: k.Boot, since: k.Since}); ok {
		return most - lived
	}
	return min(most, notAfter.Sub(now.wall.Add(k.Skew)))
}

// remove forgets what is kept under the name.
func (s *store) remove(name string) error {
	err := os.Remove(s.path(name))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return err
}

// prune removes keys of workloads that are no longer there, and what a crash left half written.
func (s *store) prune(names map[string]bool) error {
	entries, err := os.ReadDir(s.dir)
	if err != nil {
		return err
	}
	var errs []error
	for _, e := range entries {
		name, isKept := strings.CutSuffix(e.Name(), keptSuffix)
		if strings.HasPrefix(e.Name(), temporary) || isKept && !names[name] && (strings.HasPrefix(name, "svid-")) {
			errs = append(errs, os.Remove(filepath.Join(s.dir, e.Name())))
		}
	}
	return errors.Join(errs...)
}
