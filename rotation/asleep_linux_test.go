package rotation

import (
	"testing"
	"time"
)

func TestAsleepStandsStillWhileAwake(t *testing.T) {
	before := asleep()
	time.Sleep(20 * time.Millisecond)
	if moved := (asleep() - before).Abs(); moved > 10*time.Millisecond {
		t.Errorf("moved by %v", moved)
	}
	if before < -time.Second {
		t.Errorf("asleep for %v", before)
	}
}
