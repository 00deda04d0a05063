package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"
)

// tally counts requests. Its JSON form is what tests read.
type tally struct {
	mu sync.Mutex

	OK     int64 `json:"ok"`
	Failed int64 `json:"failed"`
	// Last is the last failure, with its time.
	Last string `json:"last"`
	// Answers are how many different ones came, Answer the last.
	Answers int    `json:"answers"`
	Answer  string `json:"answer"`

	seen map[string]bool
}

// traffic sends requests at a rate, each on a connection of its own, and answers at address with what came of them.
func traffic(ctx context.Context, url, rate, address string) error {
	perSecond, err := strconv.Atoi(rate)
	if err != nil || perSecond < 1 || perSecond > 1000 {
		return fmt.Errorf("%q is no rate: requests a second, 1 to 1000", rate)
	}
	count := &tally{seen: map[string]bool{}}
	server := &http.Server{Addr: address, ReadHeaderTimeout: 5 * time.Second, Handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		count.mu.Lock()
		defer count.mu.Unlock()
		_ = json.NewEncoder(w).Encode(count)
	})}
	defer context.AfterFunc(ctx, func() { _ = server.Close() })()
	go count.send(ctx, url, perSecond)
	if err := server.ListenAndServe(); !errors.Is(err, http.ErrServerClosed) {
		return err
	}
	return nil
}

func (c *tally) send(ctx context.Context, url string, perSecond int) {
	client := &http.Client{Timeout: 20 * time.Second, Transport: &http.Transport{DisableKeepAlives: true}}
	tick := time.NewTicker(time.Second / time.Duration(perSecond))
	defer tick.Stop()
	free := make(chan struct{}, 100) // bounds the requests under way
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
			free <- struct{}{}
			go func() {
				defer func() { <-free }()
				answer, err := one(ctx, client, url)
				if ctx.Err() == nil {
					c.count(answer, err)
				}
			}()
		}
	}
}

func one(ctx context.Context, client *http.Client, url string) (string, error) {
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return "", err
	}
	answer, err := client.Do(request)
	if err != nil {
		return "", err
	}
	defer answer.Body.Close()
	text, err := io.ReadAll(io.LimitReader(answer.Body, 1<<10))
	if err == nil && answer.StatusCode != http.StatusOK {
		err = fmt.Errorf("%s: %s", answer.Status, strings.TrimSpace(string(text)))
	}
	return strings.TrimSpace(string(text)), err
}

func (c *tally) count(answer string, err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if err == nil {
		c.OK++
		c.seen[answer] = true
		c.Answers, c.Answer = len(c.seen), answer
		return
	}
	if c.OK == 0 && errors.Is(err, syscall.ECONNREFUSED) {
		return // kube-proxy knows a Service's pods a moment after they are Ready: until then nobody is there to answer
	}
	c.Failed++
	c.Last = time.Now().UTC().Format(time.RFC3339Nano) + " " + err.Error()
	fmt.Println(c.Last)
}
