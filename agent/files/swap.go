package files

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/meshca/meshca/agent"
)

// swap makes one change of a directory appear at once. It is a list of steps, so that a crash after each of them can be
// tried: whatever was reached, readers find the files of before or those of after, and the next swap begins anew.
type swap struct {
	dir    *directory
	config Config
	files  map[string]file
	whose  agent.Bearer
	// generation is the name of the new directory: when it was made.
	generation string
	now        time.Time
	steps      []func() error
}

func newSwap(d *directory, c Config, files map[string]file, whose agent.Bearer, now time.Time) *swap {
	s := &swap{dir: d, config: c, files: files, whose: whose, now: now.UTC()}
	s.steps = []func() error{
		s.ours,    // 1. none of the names is somebody else's
		s.prepare, // 2. a directory that nobody else can enter yet
		s.write,   // 3. the files in it, with their owners and modes, and whose they are, on disk
		s.open,    // 4. readers may enter
		s.link,    // 5. names that are new lead nowhere until the next step
		s.point,   // 6. the link that is to become ..data
		s.rename,  // 7. from here on all names lead to the new files
		s.unlink,  // 8. names that are no more
	}
	return s
}

func (s *swap) run() error {
	for _, step := range s.steps {
		if err := step(); err != nil {
			return err
		}
	}
	return nil
}

// ours refuses names under which something stands that is not of our making: it may be what a process reads until it is
// moved to these files.
func (s *swap) ours() error {
	for _, name := range s.names() {
		info, err := s.dir.root.Lstat(name)
		switch {
		case errors.Is(err, fs.ErrNotExist):
			continue
		case err != nil:
			return err
		case info.Mode()&fs.ModeSymlink == 0:
			return s.foreign(name, "a file")
		}
		if to, err := s.dir.root.Readlink(name); err != nil || to != linkTo(name) {
			return s.foreign(name, fmt.Sprintf("a link to %q", to))
		}
	}
	return nil
}

func (s *swap) foreign(name, what string) error {
	return fmt.Errorf("%s is %s that this agent did not make: move it away, or name another directory", filepath.Join(s.dir.path, name), what)
}

// prepare takes the next free name: a clock may stand still, or be set back.
func (s *swap) prepare() error {
	for n := range time.Duration(1000) {
		s.generation = s.now.Add(n).Format(nameForm)
		if err := s.dir.root.Mkdir(s.generation, 0o700); !errors.Is(err, fs.ErrExist) {
			return err
		}
	}
	return fmt.Errorf("%s is full of generations of this moment", s.dir.path)
}

func (s *swap) write() error {
	dir, err := s.dir.root.OpenRoot(s.generation)
	if err != nil {
		return err
	}
	defer func() { _ = dir.Close() }()
	for _, name := range s.names() {
		if err := s.writeFile(dir, name, s.files[name]); err != nil {
			return err
		}
	}
	if s.whose != (agent.Bearer{}) {
		if err := s.dir.own(s.generation, s.whose); err != nil {
			return err
		}
	}
	return syncDir(dir, ".")
}

func (s *swap) writeFile(dir *os.Root, name string, content file) (err error) {
	f, err := dir.OpenFile(name, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	defer func() {
		if closed := f.Close(); err == nil {
			err = closed
		}
	}()
	if _, err := f.Write(content.data); err != nil {
		return err
	}
	if s.config.UID != nil || s.config.GID != nil {
		uid, gid := -1, -1
		if s.config.UID != nil {
			uid = *s.config.UID
		}
		if s.config.GID != nil {
			gid = *s.config.GID
		}
		if err := f.Chown(uid, gid); err != nil {
			return err
		}
	}
	if err := f.Chmod(s.config.modeOf(content)); err != nil {
		return err
	}
	return f.Sync()
}

func (s *swap) open() error { return s.dir.root.Chmod(s.generation, 0o755) }

func (s *swap) link() error {
	for _, name := range s.names() {
		if err := s.dir.root.Symlink(linkTo(name), name); err != nil && !errors.Is(err, fs.ErrExist) {
			return err
		}
	}
	return nil
}

func (s *swap) point() error {
	if err := s.dir.root.Remove(dataTemp); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return s.dir.root.Symlink(s.generation, dataTemp)
}

func (s *swap) rename() error {
	if err := s.dir.root.Rename(dataTemp, dataLink); err != nil {
		return err
	}
	return syncDir(s.dir.root, ".")
}

// unlink removes our links whose files are no more.
func (s *swap) unlink() error {
	f, err := s.dir.root.Open(".")
	if err != nil {
		return err
	}
	defer f.Close()
	entries, err := f.ReadDir(-1)
	if err != nil {
		return err
	}
	for _, e := range entries {
		name := e.Name()
		if _, wanted := s.files[name]; wanted || e.Type()&fs.ModeSymlink == 0 || strings.HasPrefix(name, "..") {
			continue
		}
		if to, err := s.dir.root.Readlink(name); err != nil || to != linkTo(name) {
			continue
		}
		if err := s.dir.root.Remove(name); err != nil {
			return err
		}
	}
	return nil
}

func (s *swap) names() []string {
	names := make([]string, 0, len(s.files))
	for name := range s.files {
		names = append(names, name)
	}
	slices.Sort(names)
	return names
}

func syncDir(dir *os.Root, name string) error {
	d, err := dir.Open(path.Clean(name))
	if err != nil {
		return err
	}
	defer d.Close()
	return d.Sync()
}
