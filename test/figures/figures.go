// Package figures keeps what tests have measured for the end of `make test`, which shows nothing of a test that passed.
package figures

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/meshca/meshca/test/parts"
)

// Dir is where they are, a file for each test, in the checkout's folder of logs.
const Dir = ".logs/figures"

// Sheet is what one test has measured. It is safe for concurrent use.
type Sheet struct {
	t    testing.TB
	mu   sync.Mutex
	text strings.Builder
}

// For begins a test's sheet. It is written when the test ends, in place of that of its last run.
func For(t testing.TB) *Sheet {
	t.Helper()
	root, err := parts.Root()
	if err != nil {
		t.Fatal(err)
	}
	s := &Sheet{t: t}
	t.Cleanup(func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		if s.text.Len() == 0 {
			return
		}
		dir := filepath.Join(root, Dir)
		if err := os.MkdirAll(dir, 0o755); err != nil {
			t.Error(err)
		}
		head := fmt.Sprintf("%s (%s)\n", t.Name(), time.Now().UTC().Format(time.DateTime))
		if err := os.WriteFile(filepath.Join(dir, strings.ReplaceAll(t.Name(), "/", ".")+".txt"), []byte(head+s.text.String()), 0o644); err != nil {
			t.Error(err)
		}
	})
	return s
}

// Add adds a line.
func (s *Sheet) Add(format string, args ...any) {
	s.t.Helper()
	s.mu.Lock()
	defer s.mu.Unlock()
	s.t.Logf(format, args...)
	fmt.Fprintf(&s.text, "  "+format+"\n", args...)
}
