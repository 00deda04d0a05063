package main

import (
	"os"
	"runtime"
	"runtime/debug"
	"strconv"
	"strings"
	"testing"
)

// resident is the memory of this process, in bytes.
func resident(t *testing.T) int {
	t.Helper()
	data, err := os.ReadFile("/proc/self/statm")
	if err != nil {
		t.Skip(err)
	}
	pages, err := strconv.Atoi(strings.Fields(string(data))[1])
	if err != nil {
		t.Fatal(err)
	}
	return pages * os.Getpagesize()
}

// The collector waits for more garbage than what is live would have it, and that takes no memory.
func TestTuningTakesNoMemory(t *testing.T) {
	t.Setenv("GOGC", "")
	before := debug.SetGCPercent(100)
	t.Cleanup(func() { debug.SetGCPercent(before); ballast = nil })
	runtime.GC()
	had := resident(t)
	tuneRuntime()
	runtime.GC()
	if more := resident(t) - had; more > 4<<20 {
		t.Errorf("it takes %d bytes", more)
	}
	var m runtime.MemStats
	if runtime.ReadMemStats(&m); m.NextGC < 5*16<<20 {
		t.Errorf("the next collection comes at %d bytes", m.NextGC)
	}

	ballast = nil
	t.Setenv("GOGC", "50")
	if tuneRuntime(); ballast != nil || debug.SetGCPercent(400) != 400 {
		t.Error("GOGC in the environment decides")
	}
}
