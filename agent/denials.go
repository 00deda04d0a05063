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
// CA gone serves nothing that was denied, wherever an SVID of it comes from.
type denials struct {
	path string
	log  *slog.Logger
	// ids is the whole set of now; a set is not changed once it is in it.
	ids atomic.Pointer[map[spiffeid.ID]bool]

	mu      sync.Mutex
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

// set takes the whole set, and reports whether it is another than the one before.
func (d *denials) set(list []string) (changed bool) {
	set := make(map[spiffeid.ID]bool, len(list))
	for _, s := range list {
		id, err := spiffeid.FromString(s)
		if err != nil {
			d.log.Error("the CA denies something that is no SPIFFE ID", "error", err)
			continue
		}
		set[id] = true
	}
	if before := *d.ids.Swap(&set); maps.Equal(before, set) {
		return false
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	d.unsaved = true
	return true
}

// load takes what an earlier run kept.
func (d *denials) load() {
	data, err := readFile(d.path, maxDeniedBytes)
	if errors.Is(err, fs.ErrNotExist) {
		return
	}
	var k keptDenials
	if err == nil {
		err = json.Unmarshal(data, &k)
	}
	if err != nil {
		d.log.Error("the kept denials cannot be used; what is denied is unknown until the CA says it", "file", d.path, "error", err)
		return
	}
	d.set(k.Denied)
	d.mu.Lock()
	defer d.mu.Unlock()
	d.unsaved = false
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
