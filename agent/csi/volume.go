package csi

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"reflect"
	"time"

	"github.com/meshca/meshca/agent"
)

const (
	stateVersion  = 1
	maxStateBytes = 64 << 10
)

// volume is one volume of one pod, while somebody works on it or it stands. Whoever has its turn may touch what is below.
type volume struct {
	dir  string // of its own, for the driver alone
	turn chan struct{}
	uses int // Driver.mu guards it
	// podUID is the pod that the volume counts for; empty: none. Driver.mu guards it.
	podUID string

	// state is what was asked for; nil: nothing stands.
	state *state
	// mounted: its directory is, or was, at the kubelet's target, so a pod may use it.
	mounted bool
	asked   time.Time // when the kubelet asked last
	fault   error     // of the last republish; Driver.mu guards it
	files   *filing   // nil: no files are kept
}

// state is what is kept of a volume in its directory. It holds no token: that has a file of its own.
type state struct {
	Version int    `json:"version"`
	ID      string `json:"id"`
	Target  string `json:"target"`
	Pod     pod    `json:"pod"`
	GID     *int   `json:"gid,omitempty"`
	Wish    wish   `json:"wish"`
	// Boot is the one in which the volume was mounted; empty: it was not, or boots have no names. A mount that is gone in
	// the same boot somebody took away.
	Boot string `json:"boot,omitempty"`
	// Replaced: containers of the pod may run that have another directory mounted than this one.
	Replaced bool `json:"replaced,omitempty"`
}

func newVolume(parent, key string) *volume {
	return &volume{dir: filepath.Join(parent, key), turn: make(chan struct{}, 1)}
}

func (a *ask) state() *state {
	return &state{Version: stateVersion, ID: a.id, Target: a.target, Pod: a.pod, GID: a.gid, Wish: a.wish}
}

// fits reports whether the state is of the volume that is asked for; a is nil where who asks is not told.
func (s *state) fits(a *ask, target string) bool {
	return s.Target == target && (a == nil || a.pod.UID == s.Pod.UID)
}

func (s *state) equal(other *state) bool { return reflect.DeepEqual(s, other) }

// keyOf is the name of a volume's directory: short, since a socket's path has room for 107 bytes, and safe as a name,
// whatever the ID is.
func keyOf(id string) string {
	sum := sha256.Sum256([]byte(id))
	return hex.EncodeToString(sum[:16])
}

func (v *volume) key() string       { return filepath.Base(v.dir) }
func (v *volume) stateFile() string { return filepath.Join(v.dir, "state.json") }
func (v *volume) tokenFile() string { return filepath.Join(v.dir, "token") }

// inside is the directory that the pod sees; staged is where it gets its flags before.
func (v *volume) inside() string { return filepath.Join(v.dir, "mount") }
func (v *volume) staged() string { return filepath.Join(v.dir, "staged") }
func (v *volume) socket() string { return filepath.Join(v.inside(), "socket") }

// at reports whether the volume's directory is mounted at target.
func (v *volume) at(target string) bool {
	ours, err := os.Stat(v.inside())
	if err != nil {
		return false
	}
	there, err := os.Stat(target)
	return err == nil && os.SameFile(ours, there)
}

// workload is what the agent keeps and serves for the volume.
func (v *volume) workload() agent.Workload {
	return agent.Workload{
		Socket: v.socket(), TokenFile: v.tokenFile(), Mode: 0o666, // who gets to it is decided by the mount
		GID: v.state.GID, TTL: v.state.Wish.TTL, Pod: v.state.Pod.named(),
	}
}

// prepare makes the volume's directories and writes down what it is.
func (v *volume) prepare(s *state, label func(path string) error) error {
	if err := os.MkdirAll(v.dir, 0o700); err != nil {
		return err
	}
	err := os.Mkdir(v.inside(), 0o755) // any user of the pod must reach the socket in it; v.dir is closed to all others
	if err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	if err := os.Chmod(v.inside(), 0o755); err != nil { // whatever the umask is
		return err
	}
	if s.GID != nil {
		if err := os.Lchown(v.inside(), -1, *s.GID); err != nil {
			return err
		}
	}
	if err := label(v.inside()); err != nil {
		return err
	}
	if err := v.write(s); err != nil {
		return err
	}
	v.state = s
	return nil
}

// settle notes, also for the next run, that a pod uses the volume.
func (v *volume) settle(boot string) error {
	v.mounted = true
	if v.state.Boot == boot {
		return nil
	}
	v.state.Boot = boot
	return v.write(v.state)
}

func (v *volume) write(s *state) error {
	data, err := json.Marshal(s)
	if err != nil {
		return err
	}
	return replace(v.stateFile(), data)
}

// remove takes away what lies on the node; nothing of it is mounted any more.
func (v *volume) remove() error {
	if err := unmount(v.staged()); err != nil {
		return err
	}
	return os.RemoveAll(v.dir)
}

// load reads what an earlier run wrote down.
func (v *volume) load() (*state, error) {
	f, err := os.Open(v.stateFile())
	if err != nil {
		return nil, err
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, maxStateBytes+1))
	if err != nil {
		return nil, err
	}
	s := &state{}
	switch err := json.Unmarshal(data, s); {
	case err != nil:
		return nil, fmt.Errorf("%s is damaged: %w", v.stateFile(), err)
	case s.Version != stateVersion:
		return nil, fmt.Errorf("%s has version %d, this agent knows %d", v.stateFile(), s.Version, stateVersion)
	case keyOf(s.ID) != v.key():
		return nil, fmt.Errorf("%s is another volume's", v.stateFile())
	}
	return s, nil
}

// saveToken writes the token, where it is not there already, and says whether it did.
func (v *volume) saveToken(t secret) (changed bool, err error) {
	if old, err := os.ReadFile(v.tokenFile()); err == nil && bytes.Equal(old, []byte(t.reveal())) {
		return false, nil
	}
	return true, replace(v.tokenFile(), []byte(t.reveal()))
}

// replace puts data at path, for the agent alone: who reads it finds the old or the new. It need not outlive a crash of
// the machine: nothing of a volume does.
func replace(path string, data []byte) (err error) {
	f, err := os.CreateTemp(filepath.Dir(path), ".tmp-*") // mode 0600
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			_ = os.Remove(f.Name())
		}
	}()
	_, err = f.Write(data)
	if closed := f.Close(); err == nil {
		err = closed
	}
	if err == nil {
		err = os.Rename(f.Name(), path)
	}
	return err
}
