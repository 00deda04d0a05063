package files

import (
	"os"
	"path/filepath"
	"testing"
	"testing/synctest"

	"github.com/meshca/meshca/agent"
)

// What an earlier run left goes when somebody else than its bearer is refused for good, and for no other reason.
func TestWhoseIsLeft(t *testing.T) {
	other := agent.Bearer{Subject: "system:serviceaccount:shop:other"}
	for name, c := range map[string]struct {
		was, refused agent.Bearer
		between      func(dir string) error
		stays        bool
	}{
		"nobody is refused":                     {was: whose, stays: true},
		"somebody else is":                      {was: whose, refused: other},
		"the bearer is":                         {was: whose, refused: whose, stays: true},
		"somebody is, of one that nobody knows": {refused: other, stays: true},
		"an earlier version did not say whose it is, and it was held again": {was: whose, refused: other, between: os.Remove},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s := newStand(t, newRoot(t), nil)
				svid := s.svid()
				held := agent.Materials{SVID: svid, Bearer: c.was, Bundle: s.root.Bundle(1)}
				s.id.Set(held)
				s.start()
				s.stop()
				note := filepath.Join(s.config.Dir, dataLink, ownerNote)
				if c.between != nil {
					must(t, c.between(note))
					s.start()
					s.stop()
				}
				if info, err := os.Stat(note); (err == nil) != (c.was != agent.Bearer{}) || err == nil && info.Mode().Perm() != 0o600 {
					t.Errorf("whose it is is kept as %v, %v", info, err)
				}
				s.id.Set(agent.Materials{Bundle: s.root.Bundle(1)})
				s.start()
				s.expect(svid)
				s.id.Set(agent.Materials{Bundle: s.root.Bundle(2)}) // written anew, with the new bundle
				synctest.Wait()
				s.expect(svid)
				s.id.Set(agent.Materials{Bundle: s.root.Bundle(2), Refused: c.refused})
				synctest.Wait()
				if c.stays {
					s.expect(svid)
				} else if s.expect(nil); s.keys() != 0 {
					t.Error("a key is left")
				}
				s.stop()
			})
		})
	}
}
