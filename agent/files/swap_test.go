package files

import (
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/svid/x509svid"

	"github.com/meshca/meshca/agent"
	"github.com/meshca/meshca/test/pki"
)

func quiet() *slog.Logger { return slog.New(slog.DiscardHandler) }

func configOf(t testing.TB, sets ...Names) Config {
	t.Helper()
	c := Config{Dir: filepath.Join(t.TempDir(), "tls"), Names: sets, Log: quiet()}
	must(t, c.Check())
	return c.withDefaults()
}

// generation renders a new SVID of the root for the sets.
func generation(t testing.TB, r *pki.Root, c Config) map[string]file {
	t.Helper()
	made, err := render(c.Names, newSVID(t, r), r.Bundle(1))
	must(t, err)
	return made
}

// opened opens the directory for a test.
func opened(t testing.TB, c Config) *directory {
	t.Helper()
	d, err := openDirectory(c.Dir)
	must(t, err)
	t.Cleanup(d.close)
	return d
}

// readPair reads key and chain as a careful reader does: it finds the generation once, and reads both in it. A generation
// that is gone by then had a successor.
func readPair(dir string) (*x509svid.SVID, error) {
	for {
		generation, err := os.Readlink(filepath.Join(dir, dataLink))
		if err != nil {
			return nil, err
		}
		svid, err := x509svid.Load(filepath.Join(dir, generation, "tls.crt"), filepath.Join(dir, generation, "tls.key"))
		if now, _ := os.Readlink(filepath.Join(dir, dataLink)); errors.Is(err, fs.ErrNotExist) && now != generation {
			continue
		}
		return svid, err
	}
}

// whose is the bearer of what is written.
var whose = agent.Bearer{Subject: "system:serviceaccount:shop:web"}

func expectFiles(t *testing.T, dir string, want map[string]file) {
	t.Helper()
	for name, f := range want {
		got, err := os.ReadFile(filepath.Join(dir, name))
		if err != nil || string(got) != string(f.data) {
			t.Errorf("%s: %d bytes, %v", name, len(got), err)
		}
	}
}

func entries(t *testing.T, dir string) []string {
	t.Helper()
	list, err := os.ReadDir(dir)
	must(t, err)
	var names []string
	for _, e := range list {
		names = append(names, e.Name())
	}
	return names
}

// TestACrashAtEachStep leaves the files of before or those of after, all of one generation; the next write completes the
// change, and what was left half made goes.
func TestACrashAtEachStep(t *testing.T) {
	r := newRoot(t)
	for _, first := range []bool{true, false} {
		c := configOf(t, everySet...)
		steps := len(newSwap(opened(t, c), c, nil, whose, time.Now()).steps)
		for n := range steps + 1 {
			t.Run(fmt.Sprintf("first %t, after step %d of %d", first, n, steps), func(t *testing.T) {
				c := configOf(t, everySet...)
				before, after := generation(t, r, c), generation(t, r, c)
				if !first {
					_, _, err := put(c, before, whose, time.Now())
					must(t, err)
				}
				s := newSwap(opened(t, c), c, after, whose, time.Now())
				for _, step := range s.steps[:n] {
					must(t, step())
				}
				const rename = 7
				switch {
				case n >= rename:
					expectFiles(t, c.Dir, after)
				case !first:
					expectFiles(t, c.Dir, before)
				default:
					for name := range after {
						if _, err := os.ReadFile(filepath.Join(c.Dir, name)); !errors.Is(err, fs.ErrNotExist) {
							t.Errorf("%s can be read before all are there: %v", name, err)
						}
					}
				}
				last := generation(t, r, c)
				g, was, err := put(c, last, whose, time.Now())
				must(t, err)
				if was {
					t.Error("what was new was said to be there already")
				}
				expectFiles(t, c.Dir, last)
				if got := opened(t, c).bearer(g); got != whose {
					t.Errorf("it is %v's", got)
				}
				must(t, opened(t, c).sweep(g))
				if got, want := len(entries(t, c.Dir)), len(last)+2; got != want { // ..data, the generation, a link for each
					t.Errorf("left are %v, want %d names", entries(t, c.Dir), want)
				}
			})
		}
	}
}

func TestAHalfWrittenGenerationIsNoHindrance(t *testing.T) {
	r, c := newRoot(t), configOf(t, TLS)
	must(t, os.MkdirAll(filepath.Join(c.Dir, "..2026_01_02_03_04_05.000000006"), 0o700))
	must(t, os.WriteFile(filepath.Join(c.Dir, "..2026_01_02_03_04_05.000000006", "tls.key"), []byte("half"), 0o600))
	must(t, os.Symlink("..gone", filepath.Join(c.Dir, dataTemp)))
	want := generation(t, r, c)
	g, _, err := put(c, want, whose, time.Now())
	must(t, err)
	must(t, opened(t, c).sweep(g))
	expectFiles(t, c.Dir, want)
	if got := entries(t, c.Dir); len(got) != 5 {
		t.Errorf("left are %v", got)
	}
}

func TestTheSameFilesAreNotWrittenAgain(t *testing.T) {
	r, c := newRoot(t), configOf(t, TLS, GKE)
	want := generation(t, r, c)
	first, _, err := put(c, want, whose, time.Now())
	must(t, err)
	if second, was, err := put(c, want, whose, time.Now()); err != nil || !was || second != first {
		t.Errorf("%s, %t, %v", second, was, err)
	}
	c.Mode = 0o400
	if _, was, err := put(c, want, whose, time.Now()); err != nil || was {
		t.Errorf("with another mode: %t, %v", was, err)
	}
	must(t, os.Remove(filepath.Join(c.Dir, "tls.key")))
	if _, was, err := put(c, want, whose, time.Now()); err != nil || was {
		t.Errorf("with a name missing: %t, %v", was, err)
	}
	expectFiles(t, c.Dir, want)
}

func TestNamesThatAreNoMoreGo(t *testing.T) {
	r, c := newRoot(t), configOf(t, TLS, Istio)
	_, _, err := put(c, generation(t, r, c), whose, time.Now())
	must(t, err)
	must(t, os.Symlink("elsewhere", filepath.Join(c.Dir, "mine")))
	must(t, os.WriteFile(filepath.Join(c.Dir, "nginx.conf"), nil, 0o600))
	trust, err := render([]Names{TLS}, nil, r.Bundle(1))
	must(t, err)
	g, _, err := put(c, trust, agent.Bearer{}, time.Now())
	must(t, err)
	must(t, opened(t, c).sweep(g))
	if got := strings.Join(entries(t, c.Dir), " "); got != g+" ..data ca.crt mine nginx.conf" && got != "..data "+g+" ca.crt mine nginx.conf" {
		t.Errorf("left are %s", got)
	}
}

func TestModesAndOwners(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("files can be given away by root alone")
	}
	r := newRoot(t)
	uid, gid := 4321, 1234
	for name, tt := range map[string]struct {
		change func(*Config)
		mode   fs.FileMode
		uid    int
		gid    int
	}{
		"plain":      {func(*Config) {}, 0o600, 0, 0},
		"group":      {func(c *Config) { c.GID = &gid }, 0o640, 0, gid},
		"user":       {func(c *Config) { c.UID = &uid }, 0o600, uid, 0},
		"everything": {func(c *Config) { c.UID, c.GID, c.Mode = &uid, &gid, 0o440 }, 0o440, uid, gid},
	} {
		t.Run(name, func(t *testing.T) {
			c := Config{Dir: filepath.Join(t.TempDir(), "a", "b"), Names: everySet, Log: quiet()}
			tt.change(&c)
			c = c.withDefaults()
			files := generation(t, r, c)
			_, _, err := put(c, files, whose, time.Now())
			must(t, err)
			for name, f := range files {
				info, err := os.Stat(filepath.Join(c.Dir, name))
				must(t, err)
				want := tt.mode
				if !f.secret {
					want = 0o644
				}
				if info.Mode() != want || ownerOf(info) != tt.uid || groupOf(info) != tt.gid {
					t.Errorf("%s: %v of %d:%d, want %v of %d:%d", name, info.Mode(), ownerOf(info), groupOf(info), want, tt.uid, tt.gid)
				}
			}
			if info, err := os.Stat(filepath.Join(c.Dir, dataLink)); err != nil || info.Mode().Perm() != 0o755 {
				t.Errorf("the generation: %v, %v", info, err)
			}
		})
	}
}

// TestReadersAlwaysFindAPair reads without a pause while generations come and go.
func TestReadersAlwaysFindAPair(t *testing.T) {
	r, c := newRoot(t), configOf(t, TLS)
	first := generation(t, r, c)
	before, _, err := put(c, first, whose, time.Now())
	must(t, err)
	done := make(chan struct{})
	var readers sync.WaitGroup
	for range 2 {
		readers.Go(func() {
			seen := map[string]bool{}
			for n := 0; ; n++ {
				svid, err := readPair(c.Dir) // Load compares key and certificate
				if err != nil {
					t.Errorf("read %d: %v", n, err)
					return
				}
				seen[svid.Certificates[0].SerialNumber.String()] = true
				select {
				case <-done:
					if len(seen) < 2 {
						t.Errorf("a reader saw %d generations in %d reads: nothing was proven", len(seen), n)
					}
					return
				default:
				}
			}
		})
	}
	for range 40 {
		now, _, err := put(c, generation(t, r, c), whose, time.Now())
		must(t, err)
		must(t, opened(t, c).sweep(before, now)) // the one before lingers, as in Keep
		before = now
	}
	close(done)
	readers.Wait()
}

func TestWhatOthersPutThereIsNeitherFollowedNorReplaced(t *testing.T) {
	r := newRoot(t)
	for name, plant := range map[string]func(t *testing.T, dir, outside string){
		"a file": func(t *testing.T, dir, _ string) {
			must(t, os.WriteFile(filepath.Join(dir, "tls.key"), []byte("mine"), 0o600))
		},
		"a link":         func(t *testing.T, dir, outside string) { must(t, os.Symlink(outside, filepath.Join(dir, "tls.key"))) },
		"a link inside":  func(t *testing.T, dir, _ string) { must(t, os.Symlink("..data/ca.crt", filepath.Join(dir, "tls.key"))) },
		"a directory":    func(t *testing.T, dir, _ string) { must(t, os.Mkdir(filepath.Join(dir, "ca.crt"), 0o700)) },
		"..data as such": func(t *testing.T, dir, _ string) { must(t, os.Mkdir(filepath.Join(dir, dataLink), 0o700)) },
	} {
		t.Run(name, func(t *testing.T) {
			c := configOf(t, TLS)
			outside := filepath.Join(t.TempDir(), "shadow")
			must(t, os.WriteFile(outside, []byte("precious"), 0o600))
			must(t, os.Mkdir(c.Dir, 0o755))
			plant(t, c.Dir, outside)
			before := entries(t, c.Dir)
			if _, _, err := put(c, generation(t, r, c), whose, time.Now()); err == nil {
				t.Error("it was written over")
			}
			if data, err := os.ReadFile(outside); err != nil || string(data) != "precious" {
				t.Errorf("%q, %v", data, err)
			}
			for _, e := range entries(t, c.Dir) {
				if generationName.MatchString(e) {
					t.Errorf("a generation with a key is left: %v, before %v", entries(t, c.Dir), before)
				}
			}
		})
	}
}

// TestLinksOfOurOwnNamesThatLeadAway were planted while somebody else could write: nothing is read or written through them.
func TestLinksOfOurOwnNamesThatLeadAway(t *testing.T) {
	r, c := newRoot(t), configOf(t, TLS)
	outside := t.TempDir()
	must(t, os.WriteFile(filepath.Join(outside, "tls.key"), []byte("precious"), 0o600))
	must(t, os.Mkdir(c.Dir, 0o755))
	const planted = "..2026_01_02_03_04_05.000000006"
	must(t, os.Symlink(outside, filepath.Join(c.Dir, planted)))
	must(t, os.Symlink(planted, filepath.Join(c.Dir, dataLink)))
	must(t, os.Symlink(outside, filepath.Join(c.Dir, dataTemp)))
	want := generation(t, r, c)
	g, _, err := put(c, want, whose, time.Now())
	must(t, err)
	must(t, opened(t, c).sweep(g))
	expectFiles(t, c.Dir, want)
	if got := strings.Join(entries(t, outside), " "); got != "tls.key" {
		t.Errorf("outside are %s", got)
	}
	if data, _ := os.ReadFile(filepath.Join(outside, "tls.key")); string(data) != "precious" {
		t.Errorf("outside it holds %q", data)
	}
	if _, err := os.Lstat(filepath.Join(c.Dir, planted)); err == nil {
		t.Error("the planted link stands")
	}
}

func TestADirectoryOfSomebodyElseIsNoGeneration(t *testing.T) {
	c := configOf(t, TLS)
	d := opened(t, c)
	must(t, os.Mkdir(filepath.Join(c.Dir, "mine"), 0o755))
	for _, to := range []string{"mine", ".", "..", "/etc", "../tls/mine", "..2026_01_02_03_04_05.000000006"} {
		must(t, os.Symlink(to, filepath.Join(c.Dir, dataLink)))
		if got := d.current(); got != "" {
			t.Errorf("..data leads to %s, which counts as generation %s", to, got)
		}
		must(t, os.Remove(filepath.Join(c.Dir, dataLink)))
	}
}

func TestUnsafeDirectoriesAreRefused(t *testing.T) {
	r := newRoot(t)
	for name, tt := range map[string]struct {
		make func(t *testing.T, dir string)
		want string
	}{
		"others can write": {func(t *testing.T, dir string) { must(t, os.Mkdir(dir, 0o755)); must(t, os.Chmod(dir, 0o757)) }, "chmod go-w"},
		"the group can":    {func(t *testing.T, dir string) { must(t, os.Mkdir(dir, 0o755)); must(t, os.Chmod(dir, 0o775)) }, "chmod go-w"},
		"sticky": {func(t *testing.T, dir string) {
			must(t, os.Mkdir(dir, 0o755))
			must(t, os.Chmod(dir, 0o777|fs.ModeSticky))
		}, "chmod go-w"},
		"a link": {func(t *testing.T, dir string) { must(t, os.Symlink(t.TempDir(), dir)) }, "symbolic link"},
		"a file": {func(t *testing.T, dir string) { must(t, os.WriteFile(dir, nil, 0o600)) }, "not a directory"},
		"somebody else's": {func(t *testing.T, dir string) {
			if os.Geteuid() != 0 {
				t.Skip("files can be given away by root alone")
			}
			must(t, os.Mkdir(dir, 0o755))
			must(t, os.Chown(dir, 4321, -1))
		}, "belongs to uid 4321"},
	} {
		t.Run(name, func(t *testing.T) {
			c := configOf(t, TLS)
			tt.make(t, c.Dir)
			_, _, err := put(c, generation(t, r, c), whose, time.Now())
			if err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("got %v, want %q", err, tt.want)
			}
		})
	}
}
