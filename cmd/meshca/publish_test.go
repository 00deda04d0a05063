package main

import (
	"context"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

// What the file holds is published when it is there, when it changes, and again where somebody else may have changed it.
func TestPublish(t *testing.T) {
	file := filepath.Join(t.TempDir(), "bundle.json")
	synctest.Test(t, func(t *testing.T) {
		var log strings.Builder
		var mu sync.Mutex
		var put []string
		var fail error
		answer := func(err error) { mu.Lock(); defer mu.Unlock(); fail = err }
		p := &publisher{file: file, log: slog.New(slog.NewTextHandler(&log, nil)), put: func(_ context.Context, b []byte) error {
			mu.Lock()
			defer mu.Unlock()
			if fail == nil {
				put = append(put, string(b))
			}
			return fail
		}}
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		go p.run(ctx)
		is := func(after time.Duration, want ...string) {
			t.Helper()
			time.Sleep(after)
			synctest.Wait()
			mu.Lock()
			defer mu.Unlock()
			if !slices.Equal(put, want) {
				t.Errorf("published %q, want %q", put, want)
			}
		}
		write := func(text string) {
			t.Helper()
			if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
				t.Fatal(err)
			}
		}
		is(time.Second)
		write("") // as a writer leaves it for a moment
		is(2 * publishLook)
		write("one")
		is(publishLook, "one")
		is(publishAgain-2*publishLook, "one")
		is(3*publishLook, "one", "one")
		answer(errors.New("no API server"))
		write("two")
		is(10*publishLook, "one", "one")
		answer(nil)
		is(publishLook, "one", "one", "two")
		cancel()
		synctest.Wait()
		if n := strings.Count(log.String(), "no API server"); n != 1 {
			t.Errorf("the same fault was told %d times:\n%s", n, log.String())
		}
	})
}
