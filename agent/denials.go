package agent

import (
	"encoding/json"
	"errors"
	"io/fs"
	"log/slog"
	"maps"
	"slices"
	"sync"
	"sync/atomic"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// maxDeniedBytes bounds the file: some tens of thousands of IDs, more than one Sync message holds.
const maxDeniedBytes = 8 << 20

// denials are the identities that an operator denied, as the CA said last. They outlive a restart, so that one with the
// CA gone serves nothing that was denied, wherever an SVID of it comes from. Where what was kept of them is damaged
// nobody knows what is denied, and nothing that was kept is served before the CA says it.
type denials struct {
	path string
	log  *slog.Logger
	// ids is the whole set of now; a set is not changed once it is in it.
	ids atomic.Pointer[map[spiffeid.ID]bool]

	mu      sync.Mutex
	damaged error // why the kept set could not be used; nil once the CA said what is denied
	unsaved bool
	failing bool // the last write failed
}

// keptDenials is the file.
type keptDenials struct {
	Denied []string `json:"denied"`
}

func newDenials(path string, log *slog.Logger) *denials {
	d := &denials{path: path, log: log}
	d.ids.Store(&map[spiffeid.ID]bool{})
	return d
}

func (d *denials) has(id spiffeid.ID) bool { return (*d.ids.Load())[id] }

// fault is why it is not known what is denied; nil where it is.
func (d *denials) fault() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.damaged
}

// set takes the whole set, and reports whether that is news.
func (d *denials) set(list []string) (changed bool) {
	set, err := denialSet(list)
	if err != nil {
		d.log.Error("the CA denies something that is no SPIFFE ID", "error", err)
	}
	before := *d.ids.Swap(&set)
	d.mu.Lock()
	defer d.mu.Unlock()
	if maps.Equal(before, set) && d.damaged == nil {
		return false
	}
	d.damaged, d.unsaved = nil, true
	return true
}

// denialSet makes a set of a list; what is no SPIFFE ID is left out of it and told.
func denialSet(list []string) (map[spiffeid.ID]bool, error) {
	var errs []error
	set := make(map[spiffeid.ID]bool, len(list))
	for _, s := range list {
		id, err := spiffeid.FromString(s)
		if err != nil {
			errs = append(errs, err)
			continue
		}
		set[id] = true
	}
	return set, errors.Join(errs...)
}

// load takes what an earlier run kept. No file says that nothing was denied.
func (d *denials) load() {
	set, err := d.read()
	if errors.Is(err, fs.ErrNotExist) {
		return
	}
	if err != nil {
		d.log.Error("the kept denials cannot be used: what is denied is unknown, and no kept SVID is served, until the CA says it", "file", d.path, "error", err)
		d.mu.Lock()
		defer d.mu.Unlock()
		d.damaged = err
		return
	}
	d.ids.Store(&set)
}

func (d *denials) read() (map[spiffeid.ID]bool, error) {
	data, err := readFile(d.path, maxDeniedBytes)
	if err != nil {
		return nil, err
	}
	var k keptDenials
	if err := json.Unmarshal(data, &k); err != nil {
		return nil, err
	}
	if k.Denied == nil {
		return nil, errors.New("it holds no list")
	}
	return denialSet(k.Denied)
}

// keep writes the set down unless it is on disk already; what fails is tried again with the next state from the CA.
func (d *denials) keep() {
	d.mu.Lock()
	defer d.mu.Unlock()
	if !d.unsaved {
		return
	}
	k := keptDenials{Denied: []string{}}
	for id := range *d.ids.Load() {
		k.Denied = append(k.Denied, id.String())
	}
	slices.Sort(k.Denied)
	data, err := json.Marshal(k)
	if err == nil {
		err = replaceFile(d.path, data)
	}
	if err != nil && !d.failing {
		d.log.Error("the denials cannot be kept; they are in force, but a restart with the CA gone will not know them", "file", d.path, "error", err)
	}
	d.unsaved, d.failing = err != nil, err != nil
}
