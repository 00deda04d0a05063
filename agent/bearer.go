package agent

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"io/fs"
	"os"
	"strings"
	"time"
)

// lookEvery is how often it is looked whether a token file has come to be somebody else's.
const lookEvery = 10 * time.Second

// Bearer is whose a token says that it is, unverified: good enough to see that it is another's than before, and never
// good for more. It is empty for what is no service-account token.
type Bearer struct {
	Subject string `json:"subject,omitempty"`
	PodUID  string `json:"podUID,omitempty"`
}

// Other reports whether now names somebody else than b does. What names nobody tells nothing.
func (b Bearer) Other(now Bearer) bool {
	if b.Subject == "" || now.Subject == "" {
		return false
	}
	return b.Subject != now.Subject || b.PodUID != "" && now.PodUID != "" && b.PodUID != now.PodUID
}

// claims are what the agent reads in tokens, unverified.
type claims struct {
	Expires    float64 `json:"exp"`
	Subject    string  `json:"sub"`
	Kubernetes struct {
		Pod struct {
			UID string `json:"uid"`
		} `json:"pod"`
		Node struct {
			Name string `json:"name"`
		} `json:"node"`
	} `json:"kubernetes.io"`
}

func (t token) claims() (c claims, ok bool) {
	parts := strings.Split(t.secret, ".")
	if len(parts) != 3 {
		return claims{}, false
	}
	payload, err := base64.RawURLEncoding.DecodeString(parts[1])
	if err != nil || json.Unmarshal(payload, &c) != nil {
		return claims{}, false
	}
	return c, true
}

// end is what the token says of its end.
func (t token) end() (time.Time, bool) {
	c, ok := t.claims()
	if !ok || c.Expires <= 0 || c.Expires > 1<<40 {
		return time.Time{}, false
	}
	return time.Unix(int64(c.Expires), 0), true
}

func (t token) bearer() Bearer {
	c, _ := t.claims()
	return Bearer{Subject: c.Subject, PodUID: c.Kubernetes.Pod.UID}
}

// watchTokens looks at the token files of all workloads until ctx ends.
func (a *Agent) watchTokens(ctx context.Context) {
	look := time.NewTicker(lookEvery)
	defer look.Stop()
	looked := make(map[*workload]fs.FileInfo)
	for {
		select {
		case <-look.C:
		case <-ctx.Done():
			return
		}
		before := looked
		looked = make(map[*workload]fs.FileInfo, len(before))
		for _, w := range a.roster.list() {
			looked[w] = w.lookAtToken(before[w])
		}
	}
}

// lookAtToken asks for a new SVID at once when the token file has come to name somebody else. before is the file as it
// was read last; lookAtToken reads it again only if it was changed, and returns how it is.
func (w *workload) lookAtToken(before fs.FileInfo) fs.FileInfo {
	info, err := os.Stat(w.TokenFile)
	if err != nil {
		return before // Renew says what is wrong with it
	}
	if before != nil && os.SameFile(before, info) && before.ModTime().Equal(info.ModTime()) && before.Size() == info.Size() {
		return before
	}
	token, err := readToken(w.TokenFile)
	if err != nil {
		return before
	}
	w.mu.Lock()
	changed := w.state.bearer.Other(token.bearer())
	w.mu.Unlock()
	if changed {
		w.log.Info("the token file names somebody else than before; asking for a new SVID")
		w.renewNow()
	}
	return info
}
